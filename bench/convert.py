"""Our converter and llama.cpp's own, side by side, on a random checkpoint of Hunyuan-A13B's shape and vocabulary.

What is measured, and how:
  start-up    seconds from the start of the process to the first byte of weights written
  write rate  bytes of the file's weights by the seconds from there to the end, the file synced to disk; beside it
              `cp --reflink=never` of the checkpoint's weights, synced too; medians over pairs, first the one and
              then the other in front, the checkpoint in the page cache before each
  peak RSS    ru_maxrss of the process, for this checkpoint and for a smaller one
Then bench/quantize.py: the same checkpoint to Q4_K_M in one pass, beside llama.cpp's quantize step alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from common import A13B, DATA, ROOT, WORK, checkpoint, files_of, gigabytes, our_command, say, settle, size_of, sync

PEER = ROOT / "tests" / "stock" / "peer.py"
POLL_SECONDS = 0.005

SMALL = {**A13B, "n_layer": 1, "n_embd": 512, "n_head": 4, "n_head_kv": 1, "n_ff": 384}
EXPERTS = {"n_expert": 64, "n_expert_used": 8}

DATA_START = "import sys, gguf; print(gguf.GGUFReader(sys.argv[1]).data_offset)"


@dataclass(frozen=True)
class Run:
    """One conversion: seconds from start to first weight, from there until the file was on disk, and peak memory."""

    startup: float
    writing: float
    n_bytes: int
    peak_rss: int

    @property
    def rate(self) -> float:
        """Bytes of weights per second."""
        return self.n_bytes / self.writing


def main() -> int:
    options = parse()
    vocab = options.data / "a13b" / "hy.tiktoken"
    if not vocab.is_file():
        sys.exit(f"error: {vocab}: the real vocabulary is needed; set HYMOE_TEST_DATA")
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        small = checkpoint(work / "small", vocab, {**SMALL, **EXPERTS})
        check_room(work, options.layers)
        large = checkpoint(work / "large", vocab, {**A13B, **EXPERTS, "n_layer": options.layers})
        say(f"checkpoint: {options.layers} layers of A13B's shape, {gigabytes(size_of(large))}")
        say(f"smaller one: {gigabytes(size_of(small))}")
        report(measure(options, work, small, large))
    if options.skip_quantize:
        return 0
    quantize = [sys.executable, Path(__file__).with_name("quantize.py"), "--work", options.work, "--data", options.data]
    return subprocess.run(quantize, check=False).returncode


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=1, help="layers, 4.9 GB each beside 1 GB of embeddings [%(default)s]"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder on the disk to measure")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with a13b/hy.tiktoken [$HYMOE_TEST_DATA]")
    parser.add_argument("--pairs", type=int, default=5, help="runs of our converter and of cp, in turn [%(default)s]")
    parser.add_argument(
        "--skip-stock", action="store_true", help="leave out llama.cpp's converter, which takes minutes"
    )
    parser.add_argument("--skip-quantize", action="store_true", help="leave out the way to Q4_K_M")
    return parser.parse_args()


def measure(options: argparse.Namespace, work: Path, small: Path, large: Path) -> dict[str, Any]:
    """Run everything; give the medians by side."""
    ours: list[Run] = []
    copies: list[float] = []
    jobs: list[Callable[[], None]] = [
        lambda: ours.append(run(our_command(large, "BF16"), large, work / "ours.gguf")),
        lambda: copies.append(copy(large, work / "copy")),
    ]
    for i in range(options.pairs + 1):
        for job in jobs if i % 2 else reversed(jobs):
            job()
        label = f"pair {i}" if i else "warm-up, not counted"
        say(f"{label}: ours {mb(ours[-1].rate)}, cp {mb(copies[-1])}, ratio {ours[-1].rate / copies[-1]:.2f}")
    ours, copies = ours[1:], copies[1:]
    found: dict[str, Any] = {
        "ours": ours,
        "cp": copies,
        "ours, smaller": run(our_command(small, "BF16"), small, work / "ours.gguf"),
    }
    if not options.skip_stock:
        for name, source in (("stock", large), ("stock, smaller", small)):
            with stock_command(source, work / "view") as (command, environment):
                say(f"{name}: minutes of vocabulary first")
                full = [*command, "--outtype", "bf16", "--outfile"]
                found[name] = run(full, source, work / "stock.gguf", environment)
    return found


def report(found: Mapping[str, Any]) -> None:
    """Print the table."""
    ours, stock = found["ours"], found.get("stock")
    cp = median(found["cp"])
    rate = median(run.rate for run in ours)
    ratio = median(run.rate / copied for run, copied in zip(ours, found["cp"], strict=True))
    rows = [
        ("", "stock", "ours"),
        ("start-up", stock and f"{stock.startup:.1f} s", f"{median(run.startup for run in ours):.2f} s"),
        ("write rate", stock and mb(stock.rate), mb(rate)),
        ("cp of the same bytes", mb(cp), mb(cp)),
        ("write rate / cp", stock and f"{stock.rate / cp:.2f}", f"{ratio:.2f}"),
        (
            "whole conversion",
            stock and f"{stock.startup + stock.writing:.1f} s",
            f"{median(run.startup + run.writing for run in ours):.1f} s",
        ),
        ("peak RSS", stock and gigabytes(stock.peak_rss), gigabytes(max(run.peak_rss for run in ours))),
        (
            "peak RSS, smaller checkpoint",
            stock and gigabytes(found["stock, smaller"].peak_rss),
            gigabytes(found["ours, smaller"].peak_rss),
        ),
    ]
    for label, theirs, mine in rows:
        print(f"{label:<30}{theirs or '-':>14}{mine:>14}")


# -- one measurement each ---------------------------------------------------------------------------------------------


def run(command: Sequence[str], source: Path, out: Path, environment: Mapping[str, str] | None = None) -> Run:
    """Run the conversion of `source` by `command` and the output's name, sync the file, and remove it."""
    settle(source)
    seen: list[tuple[float, int]] = []
    begun = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, str(out)], stdout=log, stderr=log, env={**os.environ, **(environment or {})}, cwd=ROOT
        )
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            seen.append((time.monotonic() - begun, written(process.pid)))
            time.sleep(POLL_SECONDS)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode(errors="replace")[-2000:])
    sync(out)
    wall = time.monotonic() - begun
    start = int(subprocess.check_output([sys.executable, "-c", DATA_START, str(out)]))
    startup = next((when for when, n in seen if n > start), wall)
    n_bytes = out.stat().st_size - start
    out.unlink()
    return Run(startup, wall - startup, n_bytes, usage.ru_maxrss * 1024)


def written(pid: int) -> int:
    """Bytes that a process has handed to write calls so far (its log is small beside the file's header)."""
    try:
        fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines())
        return int(fields["wchar"])
    except (OSError, KeyError):
        return 0


def copy(checkpoint_folder: Path, target: Path) -> float:
    """Copy the weights of a checkpoint, sync them, remove the copy; gives bytes per second."""
    files = files_of(checkpoint_folder)
    target.mkdir()
    settle(checkpoint_folder)
    begun = time.monotonic()
    subprocess.run(["cp", "--reflink=never", *files, target], check=True)
    for file in target.iterdir():
        sync(file)
    seconds = time.monotonic() - begun
    shutil.rmtree(target)
    return sum(file.stat().st_size for file in files) / seconds


# -- what is run ------------------------------------------------------------------------------------------------------


@contextmanager
def stock_command(folder: Path, view: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Give llama.cpp's command and environment for a view of the checkpoint, which is removed afterwards."""
    command: list[str] = json.loads(subprocess.check_output([sys.executable, PEER, folder, view]))
    try:
        yield command, {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(view / "modules")}
    finally:
        shutil.rmtree(view)


def check_room(folder: Path, n_layer: int) -> None:
    """Stop where the checkpoint and two copies of it would not fit."""
    need = 3 * (n_layer * 4_950_000_000 + 1_100_000_000)
    free = shutil.disk_usage(folder).free
    if free < need:
        sys.exit(f"error: {folder}: {gigabytes(free)} free, {gigabytes(need)} needed; name another disk with --work")


def mb(rate: float) -> str:
    return f"{rate / 1e6:.0f} MB/s"


if __name__ == "__main__":
    sys.exit(main())
