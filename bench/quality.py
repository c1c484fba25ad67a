"""Our recipes beside the stock types at equal size: mean KL divergence on held-out conversations.

For each of stock's Q4_K_M, Q3_K_M and Q2_K, with one imatrix:

  stock       llama-quantize, with the imatrix and without
  ours        `hy-imatrix recipe --size` of the stock file's size, then `hy-convert --recipe`
  same types  the same with no other types than the stock file has
  no imatrix  a recipe that was made without the imatrix, and converted without

and then `hy-imatrix quality` over all of them. Ends with status 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import BIN, ROOT, WORK, say

QUANTS = ("Q4_K_M", "Q3_K_M", "Q2_K")
MAX_RATIO = 0.85
MAX_SIZE_OFF = 0.005
MODEL = ROOT / "models" / "miniature" / "Hunyuan-Miniature-FP8"

TYPES = """
import sys, json, gguf
tensors = gguf.GGUFReader(sys.argv[1]).tensors
print(json.dumps(sorted({t.tensor_type.name for t in tensors} - {"F32", "F16", "BF16"})))
"""


def main() -> int:
    options = parse()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    reference, imatrix = work / "BF16.gguf", work / "imatrix.gguf"
    # A new file is another model to the measurements that are kept.
    if not reference.exists():
        run(BIN / "hy-convert", options.model, reference, "--quant", "BF16")
    if options.imatrix:
        imatrix = options.imatrix
    elif not imatrix.exists():
        run(BIN / "hy-imatrix", "collect", reference, "-o", imatrix, "--threads", options.threads)
    files = [path for quant in QUANTS for path in variants(options, reference, imatrix, quant)]
    rows = quality(options, reference, files)
    return report(options, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL, help="a checkpoint folder [%(default)s]")
    parser.add_argument(
        "--work", type=Path, default=WORK / "quality", help="folder for the files [build/bench/quality]"
    )
    parser.add_argument("--imatrix", type=Path, help="an imatrix of the model [hy-imatrix collect]")
    parser.add_argument("--threads", default="1", help="[%(default)s]")
    parser.add_argument("--tokens", default="4096", help="of held-out text [%(default)s]")
    parser.add_argument("--plot", type=Path, help="draw bits per weight against mean KL (.svg)")
    parser.add_argument("--page", type=Path, help="write the table between the markers of this page")
    return parser.parse_args()


def variants(options: argparse.Namespace, reference: Path, imatrix: Path, quant: str) -> list[Path]:
    """Make the files of one stock type."""
    work, with_imatrix = options.work, ["--imatrix", imatrix]
    stock, bare = work / f"{quant}.stock.gguf", work / f"{quant}.stock-bare.gguf"
    run(tool("llama-quantize"), *with_imatrix, reference, stock, quant, "1")
    run(tool("llama-quantize"), reference, bare, quant, "1")
    size = ["--size", stock.stat().st_size]
    found = [stock, bare]
    menu = ",".join(json.loads(output(sys.executable, "-c", TYPES, stock)))
    for name, arguments, given in (
        ("ours", [], with_imatrix),
        ("ours-same", ["--menu", menu], with_imatrix),
        ("ours-bare", [], []),
    ):
        recipe, out = work / f"{quant}.{name}.recipe", work / f"{quant}.{name}.gguf"
        common = [*size, *arguments, *given, "-o", recipe, "--overwrite", "--threads", options.threads]
        run(BIN / "hy-imatrix", "recipe", reference, *common)
        run(BIN / "hy-convert", options.model, out, "--quant", quant, *given, "--recipe", recipe, "--overwrite")
        found.append(out)
    return found


def quality(options: argparse.Namespace, reference: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Measure every file; gives mean, error and so on, and the file's size, by name."""
    common = ["--json", "--tokens", options.tokens, "--threads", options.threads, "--work", options.work]
    found = json.loads(output(BIN / "hy-imatrix", "quality", reference, *files, *common))
    rows = {Path(row["file"]).stem: row["quality"] | row for row in found}
    (options.work / "quality.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


def report(options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> int:
    lines = [
        "| file | MB | bits per weight | mean KL | 99 % | max | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        mean = f"{row['mean']:.5f} ± {row['error']:.5f}"
        cells = [f"{row['n_bytes'] / 1e6:.2f}", f"{row['bits_per_weight']:.3f}", mean]
        cells += [f"{row['p99']:.4f}", f"{row['largest']:.3f}", f"{100 * row['top1']:.2f} %"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    verdicts = [line for quant in QUANTS for line in judge(rows, quant)]
    lines += ["", "| at the size of | what | ratio | target |", "|---|---|---|---|"]
    lines += [
        f"| {quant} | {what} | {ratio:.3f} | {target} |{'' if met else ' MISSED'}"
        for quant, what, ratio, target, met in verdicts
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.plot:
        draw(options.plot, rows)
    if options.page:
        insert(options.page, text)
    return 0 if all(met for *_, met in verdicts) else 1


def judge(rows: dict[str, dict[str, Any]], quant: str) -> list[tuple[str, str, float, str, bool]]:
    stock, ours, same, bare = (rows[f"{quant}.{name}"] for name in ("stock", "ours", "ours-same", "ours-bare"))
    size = ours["n_bytes"] / stock["n_bytes"]
    ratios = {
        "size, ours / stock": (size, "1 ± 0.005", abs(size - 1) <= MAX_SIZE_OFF),
        "KL, ours / stock": (r := ours["mean"] / stock["mean"], f"<= {MAX_RATIO}", r <= MAX_RATIO),
        "KL, same types / stock": (r := same["mean"] / stock["mean"], "< 1", r < 1),
        "KL, ours with imatrix / without": (r := ours["mean"] / bare["mean"], "<= 1", r <= 1),
        "KL, stock with imatrix / without": (stock["mean"] / rows[f"{quant}.stock-bare"]["mean"], "", True),
    }
    return [(quant, what, *rest) for what, rest in ratios.items()]


def draw(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    from hymoe.imatrix.plot import Point, svg

    names = {"stock": "stock, imatrix", "stock-bare": "stock", "ours": "recipe, imatrix", "ours-bare": "recipe"}
    series = {
        label: [
            Point(
                rows[f"{quant}.{name}"]["bits_per_weight"],
                rows[f"{quant}.{name}"]["mean"],
                quant if name == "stock" else "",
            )
            for quant in QUANTS
        ]
        for name, label in names.items()
    }
    path.write_text(svg(series), encoding="utf-8")


def insert(page: Path, text: str) -> None:
    begin, end = "<!-- bench/quality.py -->\n", "<!-- end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


# -- running ----------------------------------------------------------------------------------------------------------


def tool(name: str) -> Path:
    return Path(output(BIN / "hy-engine", "path").strip()) / name


def output(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {Path(str(command[0])).name} {command[1]}: exit status {done.returncode}")
    return done.stdout


def run(*command: object) -> None:
    say(" ".join(Path(str(part)).name if isinstance(part, Path) else str(part) for part in command))
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:] or f"error: {command[0]}: exit status {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
