"""What a repair is worth: the miniature's importance, half of each layer's experts as if no token had reached them.

    collected  on hymoe's calibration set; then the data of half of the experts, drawn at random, are thrown away
    repaired   by `hy-imatrix repair`, which does not see what was thrown away
    true       collected on other text (--held-out), of the same experts

Printed for each kind of matrix: the cosine and the correlation between true importance and the repaired one; all ones,
which is what quantizing without data assumes; and, as what no repair can beat by much, the data that were thrown away.
Ends with status 1 where an expert is left without data, or the repair is not better than all ones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import BIN, ROOT, say

from hymoe.imatrix import coverage, files, repair
from hymoe.imatrix.files import Entry, Imatrix

MODEL = ROOT / "models" / "miniature" / "Hunyuan-Miniature-FP8"
HELD_OUT = sorted((ROOT / "training" / "corpus").glob("*.txt"))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        rows, n_empty = measure(options.model, options.held_out, Path(folder), options.threads)
    print(f"{'':9}{'matrices':>9}{'repaired':>18}{'all ones':>18}{'thrown away':>18}")
    print(f"{'':9}{'':9}" + 3 * f"{'cosine  corr.':>18}")
    worse = 0
    for mine, best in rows:
        worse += mine.cosine <= mine.cosine_of_ones or mine.correlation <= 0.3
        pairs = ((mine.cosine, mine.correlation), (mine.cosine_of_ones, 0.0), (best.cosine, best.correlation))
        print(f"{mine.kind:9}{mine.n_matrices:9}" + "".join(f"{cos:11.3f}{corr:7.3f}" for cos, corr in pairs))
    print(f"experts without data after the repair: {n_empty}")
    return int(bool(worse or n_empty))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What hy-imatrix repair is worth.")
    parser.add_argument("--model", type=Path, default=MODEL, help="a checkpoint, or a GGUF")
    parser.add_argument("--held-out", type=Path, nargs="+", default=HELD_OUT, help="text for the true importance")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    return parser.parse_args(argv)


def measure(
    model: Path, held_out: Sequence[Path], folder: Path, threads: int
) -> tuple[list[tuple[repair.Agreement, repair.Agreement]], int]:
    gguf = model if model.is_file() else folder / "model.gguf"
    whole, half, fixed, true = (folder / f"{name}.gguf" for name in ("whole", "half", "fixed", "true"))
    if gguf != model:
        run("hy-convert", model, gguf)
    texts = [word for path in held_out for word in ("--text", path)]
    run("hy-imatrix", "collect", gguf, "-o", whole, "--threads", threads)
    run("hy-imatrix", "collect", gguf, "-o", true, "--threads", threads, *texts)
    files.save(half, without_half(files.read(whole)))
    run("hy-imatrix", "repair", half, "--model", gguf, "-o", fixed, "--threads", threads)
    after, truth = files.read(fixed), files.read(true)
    thrown_away = replace(files.read(whole), notes=after.notes)
    rows = (repair.agreement(each, truth, coverage.FLOOR) for each in (after, thrown_away))
    return list(zip(*rows, strict=True)), sum(map(after.n_empty, after.entries))


def without_half(imatrix: Imatrix) -> Imatrix:
    """Throw away the data of half of each layer's experts."""
    entries = dict(imatrix.entries)
    for name, (sums, counts) in imatrix.entries.items():
        if len(counts) > 1:
            draw = np.random.default_rng(int(name.split(".")[1]))
            kept = draw.permutation(len(counts)) % 2 == 0
            slices = sums.reshape(len(counts), -1) * kept[:, None]
            entries[name] = Entry(slices.reshape(-1), counts * kept)
    return replace(imatrix, entries=entries)


def run(command: str, *arguments: object) -> None:
    words = [str(BIN / command), *map(str, arguments)]
    say(" ".join([command, *words[1:]]))
    subprocess.run([*words, "--quiet"], check=True)


if __name__ == "__main__":
    sys.exit(main())
