"""Checkpoint to Q4_K_M in one pass, beside llama.cpp's quantize step alone, on a random checkpoint of A13B's shape.

What is measured, and how:
  wall ratio  `hy-convert CHECKPOINT OUT --quant Q4_K_M` by `llama-quantize BF16.gguf OUT Q4_K_M THREADS`, which has
              its BF16 GGUF already; to the file synced to disk, in pairs, first the one and then the other in front,
              what is read in the page cache before each
  tensors     names, types, shapes and sha256 of the data of both files, tensor by tensor
  threads     our wall time bound to one processor and to all of them
  peak disk   the most that our run had in its folder at a time, by the size of the file: 1 is the file alone
  peak RSS    ru_maxrss of our process, for this checkpoint and for others of --sizes

Ends with status 1 where a target is missed. The vocabulary is the real one where HYMOE_TEST_DATA has it.
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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from common import A13B, BIN, DATA, ROOT, WORK, gigabytes, our_command, say, settle, size_of, sync
from common import checkpoint as write_checkpoint

QUANT = "Q4_K_M"
MAX_RATIO = 1.05
MAX_DISK = 1.01
POLL_SECONDS = 0.2
MAX_RSS = 1_500_000_000

EXPERT_BYTES = 2 * 3 * 4096 * 3072
# Attention and the shared expert, which is as wide as a routed one.
LAYER_BYTES = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096) + EXPERT_BYTES
FULL_LAYER = 64
# Q4_K_M of BF16, with room to spare: about five of sixteen bits.
QUANT_SHARE = 0.35

DIGESTS = """
import sys, json, hashlib, gguf
for t in gguf.GGUFReader(sys.argv[1]).tensors:
    print(json.dumps([t.name, t.tensor_type.name, t.shape.tolist(), hashlib.sha256(t.data).hexdigest()]))
"""


@dataclass(frozen=True)
class Run:
    """One run: seconds until its file was on disk, seconds of processor time, peak memory and peak disk in bytes."""

    wall: float
    cpu: float
    peak_rss: int
    peak_disk: int


@dataclass
class Table:
    """Rows of label, ours, stock and target, and whether every target so far was met."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=lambda: [("", "ours", "stock", "target")])
    met: bool = True

    def add(self, label: str, ours: str, stock: str = "") -> None:
        self.rows.append((label, ours, stock, ""))

    def judge(self, label: str, ours: str, target: str, met: bool) -> None:
        self.rows.append((label, ours, "", f"{target:<12}{'met' if met else 'MISSED'}"))
        self.met &= met

    def print(self) -> None:
        for label, ours, stock, target in self.rows:
            print(f"{label:<34}{ours:>12}{stock:>12}   {target}".rstrip())


def main() -> int:
    options = parse()
    real: Path = options.data / "a13b" / "hy.tiktoken"
    vocab = real if real.is_file() else None
    say(f"vocabulary: {vocab or 'a miniature one; set HYMOE_TEST_DATA for the real one'}")
    tool = engine_tool("llama-quantize")
    sizes = [] if options.skip_sizes else [shape_of(1e9 * gb, vocab) for gb in options.sizes]
    check_room(options.work, vocab, options.experts, sizes)
    table = Table()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        compare(options, Path(folder), vocab, tool, table)
    for n_layer, n_expert in sizes:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            source = checkpoint(Path(folder) / "in", vocab, n_layer, n_expert)
            done = run(our_command(source, QUANT), source, Path(folder) / "ours.gguf")
            judge_memory(table, source, done)
    table.print()
    return 0 if table.met else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=positive, default=FULL_LAYER, help="of the layer, 75 MB each [%(default)s]")
    parser.add_argument("--pairs", type=positive, default=2, help="runs of ours and of llama-quantize [%(default)s]")
    parser.add_argument("--sizes", type=gigabyte_list, default="4,12", help="checkpoints for memory, GB [%(default)s]")
    parser.add_argument("--skip-sizes", action="store_true", help="leave them out")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the files [build/bench]")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with a13b/hy.tiktoken [$HYMOE_TEST_DATA]")
    options = parser.parse_args()
    options.work = options.work.absolute()
    return options


def positive(text: str) -> int:
    if (n := int(text)) < 1:
        raise ValueError(text)
    return n


def gigabyte_list(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


# -- the measurements -------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace, work: Path, vocab: Path | None, tool: Path, table: Table) -> None:
    """Run the pairs, one run bound to one processor, and compare the two files."""
    source = checkpoint(work / "in", vocab, 1, options.experts)
    bf16, our_out, stock_out = work / "bf16.gguf", work / "ours.gguf", work / "stock.gguf"
    run(our_command(source, "BF16"), source, bf16)
    processors = sorted(os.sched_getaffinity(0))
    ours: list[Run] = []
    stock: list[Run] = []
    for i in range(options.pairs):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            if side == 0:
                ours.append(run(our_command(source, QUANT), source, our_out))
            else:
                stock.append(run([str(tool), str(bf16)], bf16, stock_out, [QUANT, str(len(processors))]))
        say(f"pair {i + 1}: ours {ours[-1].wall:.1f} s, llama-quantize {stock[-1].wall:.1f} s")
    judge_pairs(table, ours, stock, len(processors))
    disk = max(each.peak_disk for each in ours) / size_of(our_out)
    table.judge("peak disk / file", f"{disk:.3f}", f"<= {MAX_DISK}", disk <= MAX_DISK)
    judge_tensors(table, digests(our_out), digests(stock_out))
    scale(table, source, our_out, median(each.wall for each in ours), processors)
    judge_memory(table, source, max(ours, key=lambda each: each.peak_rss))


def judge_pairs(table: Table, ours: Sequence[Run], stock: Sequence[Run], n_threads: int) -> None:
    table.add(f"wall, {n_threads} threads", *(f"{median(each.wall for each in side):.1f} s" for side in (ours, stock)))
    table.add("CPU", *(f"{median(each.cpu for each in side):.1f} s" for side in (ours, stock)))
    table.add("peak RSS", *(gigabytes(max(each.peak_rss for each in side)) for side in (ours, stock)))
    ratios = [mine.wall / theirs.wall for mine, theirs in zip(ours, stock, strict=True)]
    for i, ratio in enumerate(ratios):
        table.add(f"wall, ours / stock, pair {i + 1}", f"{ratio:.3f}")
    ratio = median(ratios)
    table.judge("wall, ours / stock, median", f"{ratio:.3f}", f"<= {MAX_RATIO}", ratio <= MAX_RATIO)


def judge_tensors(table: Table, ours: dict[str, str], stock: dict[str, str]) -> None:
    """Both map a tensor's name to its type, shape and sha256."""
    names = sorted(ours.keys() | stock.keys())
    different = [name for name in names if ours.get(name) != stock.get(name)]
    for name in different:
        say(f"differs: {name}: ours {ours.get(name, 'absent')}, stock {stock.get(name, 'absent')}")
    equal = len(names) - len(different)
    table.judge("tensors of the same bytes", f"{equal} of {len(names)}", "all", not different and bool(names))


def scale(table: Table, source: Path, out: Path, wall: float, processors: Sequence[int]) -> None:
    """Run ours on one processor; `wall` is what it took on all of them."""
    if len(processors) == 1:
        return
    alone = run(our_command(source, QUANT), source, out, processors=processors[:1])
    table.add("wall, 1 processor", f"{alone.wall:.1f} s")
    table.add(f"wall, 1 processor / {len(processors)}", f"{alone.wall / wall:.2f}")


def judge_memory(table: Table, source: Path, done: Run) -> None:
    label = f"peak RSS, checkpoint of {gigabytes(size_of(source))}"
    say(f"{label}: {gigabytes(done.peak_rss)}, {done.wall:.1f} s")
    table.judge(label, gigabytes(done.peak_rss), f"<= {gigabytes(MAX_RSS)}", done.peak_rss <= MAX_RSS)


def run(
    command: Sequence[str], source: Path, out: Path, after: Sequence[str] = (), processors: Sequence[int] = ()
) -> Run:
    """Run `command`, the output's name, `after`, on `processors` (none: all); the file is synced and stays."""
    out.unlink(missing_ok=True)
    settle(source)
    before = on_disk(out.parent)
    bound = ["taskset", "-c", ",".join(map(str, processors))] if processors else []
    with tempfile.TemporaryFile() as log:
        begun = time.monotonic()
        process = subprocess.Popen([*bound, *command, str(out), *after], stdout=log, stderr=log, cwd=ROOT)
        peak_disk = 0
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            peak_disk = max(peak_disk, on_disk(out.parent) - before)
            time.sleep(POLL_SECONDS)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode(errors="replace")[-2000:] or f"error: {command[0]}: {process.returncode}")
        sync(out)
        wall = time.monotonic() - begun
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, peak_disk)


def on_disk(folder: Path) -> int:
    """Bytes that the files in a folder take up on the disk."""
    n_bytes = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            n_bytes += 512 * entry.stat().st_blocks * entry.is_file()
    return n_bytes


def digests(file: Path) -> dict[str, str]:
    lines = subprocess.check_output([sys.executable, "-c", DIGESTS, file], text=True).splitlines()
    return {name: f"{qtype} {shape} {digest}" for name, qtype, shape, digest in map(json.loads, lines)}


# -- what is run ------------------------------------------------------------------------------------------------------


def engine_tool(name: str) -> Path:
    """Give a program of the engine in use; end with hy-engine's own error where there is none."""
    found = subprocess.run([BIN / "hy-engine", "path"], stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        sys.exit(1)
    return Path(found.stdout.strip()) / name


def checkpoint(folder: Path, vocab: Path | None, n_layer: int, n_expert: int) -> Path:
    sizes = {"n_layer": n_layer, "n_expert": n_expert, "n_expert_used": min(8, n_expert)}
    write_checkpoint(folder, vocab, {**A13B, **sizes})
    say(f"checkpoint: {n_layer} layers, {n_expert} experts, {gigabytes(size_of(folder))}")
    return folder


# -- sizes ------------------------------------------------------------------------------------------------------------


def shape_of(n_bytes: float, vocab: Path | None) -> tuple[int, int]:
    """Give the layers and experts of a checkpoint of about that size, no more than 64 experts to a layer."""
    rest = max(0.0, n_bytes - embedding_bytes(vocab))
    n_layer = max(1, -int(-rest // (LAYER_BYTES + FULL_LAYER * EXPERT_BYTES)))
    return n_layer, max(1, round((rest / n_layer - LAYER_BYTES) / EXPERT_BYTES))


def bytes_of(n_layer: int, n_expert: int, vocab: Path | None) -> int:
    return embedding_bytes(vocab) + n_layer * (LAYER_BYTES + n_expert * EXPERT_BYTES)


def embedding_bytes(vocab: Path | None) -> int:
    """Bytes of the (tied) embedding: 210 special tokens follow the ranks; the miniature's vocabulary has 1790."""
    ranks = vocab.read_bytes().count(b"\n") if vocab else 1790
    return 2 * 4096 * (ranks + 210)


def check_room(work: Path, vocab: Path | None, n_expert: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Stop where the files of the largest step would not fit: of the pairs there are four at a time."""
    needs = [(2 + 2 * QUANT_SHARE) * bytes_of(1, n_expert, vocab)]
    needs += [(1 + QUANT_SHARE) * bytes_of(*size, vocab) for size in sizes]
    work.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(work).free, max(needs)
    if free < need:
        sys.exit(f"error: {work}: {gigabytes(free)} free, {gigabytes(need)} needed; name another disk with --work")
    say(f"disk: {gigabytes(need)} needed at a time, {gigabytes(free)} free")


if __name__ == "__main__":
    sys.exit(main())
