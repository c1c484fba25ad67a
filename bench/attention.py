"""How fast the processor attends: few tokens, a prompt and an answer behind a long context, beside the stock engine.

What is measured, and how:
  tokens/s   by each engine's own llama-bench behind --depth tokens, weights as stored, flash attention on, for each
             type of cache: 8 tokens together (as eight clients generate), a prompt of 512, and an answer of 48
  by stock   ours by stock's, in turns on the same file; the median counts, and all turns are beside it

Targets: 1.0 each. Ends with status 1 where one is missed. The file has the layers of Hunyuan-A13B, random Q4_K_M
weights, and is kept in --work for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from common import ROOT, say
from sized_model import Shape, write

TOGETHER, PROMPT, ANSWER = 8, 512, 48
TARGET = 1.0


def main() -> int:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    gguf: Path = options.work / f"a13b-shaped-{options.layers}.gguf"
    if not gguf.exists():
        say(f"writing {gguf}, {options.layers} layers")
        write(gguf, Shape(options.layers))
    print(f"{options.layers} layers, behind {options.depth} tokens, {options.threads} threads")
    print(f"{'cache':8}{'what':>12}{'stock':>10}{'ours':>10}{'by stock':>10}   all turns")
    met = True
    for kv in options.kv.split(","):
        met &= compare(options, gguf, kv)
    print(f"target {TARGET} each: {'met' if met else 'MISSED'}")
    return 0 if met else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stock", type=Path, required=True, help="folder of the stock engine (`hy-engine path --stock`)"
    )
    parser.add_argument("--layers", type=int, default=2, help="of 1.4 GB each [%(default)s]")
    parser.add_argument("--depth", type=int, default=4096, help="tokens before those that count [%(default)s]")
    parser.add_argument("--kv", default="f16,q8_0,q4_0", help="types of the cache [%(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="of both engines [%(default)s]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="[all processors]")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder for the file [build/bench]")
    return parser.parse_args()


def compare(options: argparse.Namespace, gguf: Path, kv: str) -> bool:
    """Print the rows of one type of cache; tells whether all are at the target."""
    from hymoe import engine as engines

    folders = {"stock": options.stock, "ours": engines.find().tool("llama-bench").parent}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for turn in range(options.turns):
        for name in list(folders)[:: 1 - 2 * (turn % 2)]:
            found[name].append(measure(options, folders[name], gguf, kv))
            say(f"{kv}, {name}: {found[name][-1]}")
    met = True
    for what in found["ours"][0]:
        speeds = {name: [turn[what] for turn in turns] for name, turns in found.items()}
        ratios = [ours / stock for ours, stock in zip(speeds["ours"], speeds["stock"], strict=True)]
        row = f"{kv:8}{what:>12}{median(speeds['stock']):10.2f}{median(speeds['ours']):10.2f}{median(ratios):10.2f}"
        print(f"{row}   {' '.join(f'{ratio:.2f}' for ratio in ratios)}", flush=True)
        met &= median(ratios) >= TARGET
    return met


def measure(options: argparse.Namespace, engine: Path, gguf: Path, kv: str) -> dict[str, float]:
    command = [engine / "llama-bench", "-m", gguf, "-d", options.depth, "-p", f"{TOGETHER},{PROMPT}", "-n", ANSWER]
    command += ["-t", options.threads, "-ctk", kv, "-ctv", kv, "-fa", 1, "--repack", 0, "-r", 1, "-o", "json"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    names = {(TOGETHER, 0): f"{TOGETHER} together", (PROMPT, 0): "prompt", (0, ANSWER): "answer"}
    return {names[test["n_prompt"], test["n_gen"]]: test["avg_ts"] for test in json.loads(done.stdout)}


if __name__ == "__main__":
    sys.exit(main())
