"""Generation speed against the number of experts used, on a random Q4_K_M file with the layers of Hunyuan-A13B.

What is measured, and how:
  tokens/s     of generation on the CPU with `adaptive:MIN,1`, which keeps exactly MIN experts of 8; every process
               loads the file from the page cache and decodes random tokens; the modes take turns, the median counts
  speed-up     by that of 8 experts (`topk`), beside the ratio of bytes read per token: all weights but those of
               experts, and the experts used
  stock        prefill (one prompt) and generation of `topk` by those of the stock engine on the same file, in pairs,
               first the one and then the other in front; left out where --stock names no folder

Targets: at 5 experts, where they are measured, 0.93 of the ratio of bytes; topk 0.98 of stock. Ends with status 1 where
one is missed. The file is kept in --work for the next run; layers are as many as half of the available memory holds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sized_model import Shape, layers_that_fit, write

ROOT = Path(__file__).resolve().parents[1]
N_EXPERT, N_USED, N_VOCAB = Shape(1).n_expert, Shape(1).n_expert_used, Shape(1).n_vocab
TARGET_EXPERTS, MIN_SHARE, MIN_STOCK = 5, 0.93, 0.98
KEYS = "hunyuan-moe.router"


def main() -> int:
    options = parse()
    if options.job:
        print(json.dumps(measure(options)))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    n_layer = options.layers or layers_that_fit()
    gguf: Path = options.work / f"a13b-shaped-{n_layer}.gguf"
    if not gguf.exists():
        say(f"writing {gguf}, {n_layer} layers")
        write(gguf, Shape(n_layer))
    met = compare_modes(options, gguf, n_layer)
    if options.stock:
        met &= compare_stock(options, gguf)
    return 0 if met else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="of 1.4 GB each; 0: what half of the free memory holds")
    parser.add_argument("--experts", default="8,7,6,5,4,3,2", help="numbers to measure [%(default)s]")
    parser.add_argument("--tokens", type=int, default=32, help="generated per turn [%(default)s]")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt against stock [%(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="of every mode [%(default)s]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="[all processors]")
    parser.add_argument(
        "--repack", action="store_true", help="weights repacked when loaded, which takes their size again"
    )
    parser.add_argument("--stock", type=Path, help="folder of the stock engine (`hy-engine path --stock`)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder for the file [build/bench]")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Bytes that every token reads, and those of one expert in all layers."""

    always: int
    expert: int


def sizes(gguf: Path) -> Sizes:
    """Add up the tensors of the file."""
    from gguf import GGUFReader

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(gguf).tensors}
    experts = sum(size for name, size in tensors.items() if "_exps" in name)
    return Sizes(sum(tensors.values()) - experts, experts // N_EXPERT)


def compare_modes(options: argparse.Namespace, gguf: Path, n_layer: int) -> bool:
    kept = [int(number) for number in options.experts.split(",")]
    speeds: dict[int, list[float]] = {number: [] for number in kept}
    used: dict[int, float] = {}
    for turn in range(options.turns):
        for number in kept if turn % 2 == 0 else reversed(kept):
            found = run(options, gguf, keep=number)
            speeds[number].append(found["generation"])
            used[number] = found["used"]
    size = sizes(gguf)
    full = median(speeds[kept[0]])
    print(f"{n_layer} layers, {options.threads} threads, {options.turns} turns of {options.tokens} tokens")
    print(f"{'experts':>8}{'tokens/s':>10}{'speed-up':>10}{'bytes':>8}{'share':>8}   all turns")
    met = True
    for number in kept:
        faster = median(speeds[number]) / full
        ratio = (size.always + kept[0] * size.expert) / (size.always + used[number] * size.expert)
        turns = " ".join(f"{speed:.2f}" for speed in speeds[number])
        row = f"{used[number]:8.2f}{median(speeds[number]):10.2f}{faster:10.3f}{ratio:8.3f}{faster / ratio:8.3f}"
        print(f"{row}   {turns}")
        met &= number != TARGET_EXPERTS or faster >= MIN_SHARE * ratio
    if TARGET_EXPERTS in kept:
        print(f"target at {TARGET_EXPERTS} experts: a share of {MIN_SHARE}: {'met' if met else 'MISSED'}")
    return met


def compare_stock(options: argparse.Namespace, gguf: Path) -> bool:
    ratios: dict[str, list[float]] = {"prefill": [], "generation": []}
    for turn in range(options.turns):
        engines = [None, options.stock] if turn % 2 == 0 else [options.stock, None]
        found = {engine: run(options, gguf, engine=engine, n_prompt=options.prompt) for engine in engines}
        for name, values in ratios.items():
            values.append(found[None][name] / found[options.stock][name])
    layout = "weights repacked in both" if options.repack else "weights as stored in both"
    met = True
    for name, values in ratios.items():
        met &= median(values) >= MIN_STOCK
        turns = " ".join(f"{value:.3f}" for value in values)
        print(f"topk {name} by stock, {layout}: {median(values):.3f}   target {MIN_STOCK}   all turns {turns}")
    return met


def run(
    options: argparse.Namespace, gguf: Path, *, keep: int = 0, engine: Path | None = None, n_prompt: int = 8
) -> dict[str, float]:
    """Measure in a process of its own: one process can hold only one libllama."""
    command = [sys.executable, __file__, "--job", str(gguf), "--keep", str(keep % N_USED), "--prompt", str(n_prompt)]
    command += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
    command += ["--repack"] if options.repack else []
    environment = os.environ | ({"HYMOE_ENGINE": str(engine)} if engine else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    say(f"{'stock' if engine else f'{keep or N_USED} experts'}: {found}")
    return found


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Give tokens/s of prefill and generation, and the mean number of experts used while generating."""
    from hymoe.engine import bindings

    llama = bindings.load()
    llama.llama_backend_init()
    context = load(llama, options)
    import numpy as np

    ids = np.random.default_rng(1).integers(0, N_VOCAB, options.prompt + options.tokens + 1).tolist()
    decode(llama, context, ids[:1], 0)  # pages in what is shared by all tokens
    begun = time.perf_counter()
    decode(llama, context, ids[1 : options.prompt + 1], 1)
    prefill = options.prompt / (time.perf_counter() - begun)
    before = usage(llama, context)
    begun = time.perf_counter()
    for i in range(options.tokens):
        at = options.prompt + 1 + i
        decode(llama, context, ids[at : at + 1], at)
    generation = options.tokens / (time.perf_counter() - begun)
    tokens, experts = (now - then for now, then in zip(usage(llama, context), before, strict=True))
    return {"prefill": prefill, "generation": generation, "used": experts / tokens if tokens else float(N_USED)}


def load(llama: Any, options: argparse.Namespace) -> Any:
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = options.repack
    if options.keep:
        asked = [("mode", 3, "val_str", b"adaptive"), ("min_experts", 0, "val_i64", options.keep)]
        asked.append(("threshold", 1, "val_f64", 1.0))
        params.kv_overrides = (llama.llama_model_kv_override * (len(asked) + 1))()
        for slot, (key, tag, field, value) in zip(params.kv_overrides, asked, strict=False):
            slot.key, slot.tag = f"{KEYS}.{key}".encode(), tag
            setattr(slot.value, field, value)
    model = llama.llama_model_load_from_file(os.fsencode(options.job), params)
    settings = llama.llama_context_default_params()
    settings.n_ctx = options.prompt + options.tokens + 1
    settings.n_batch = settings.n_ubatch = max(options.prompt, 1)
    settings.n_threads = settings.n_threads_batch = options.threads
    return llama.llama_init_from_model(model, settings)


def decode(llama: Any, context: Any, ids: list[int], start: int) -> None:
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, i + 1 == len(ids)
        batch.seq_id[i][0] = 0
    if status := llama.llama_decode(context, batch):
        raise SystemExit(f"llama_decode gave {status}")
    llama.llama_synchronize(context)
    llama.llama_batch_free(batch)


def usage(llama: Any, context: Any) -> tuple[int, int]:
    """Give pairs of token and layer so far, and experts used by them; zeros from an engine that does not count."""
    library = ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"]) / "libllama.so"))
    if not hasattr(library, "hymoe_expert_usage"):
        return 0, 0
    counts = (ctypes.c_uint64 * (2 * 512))()
    n_layer = library.hymoe_expert_usage(ctypes.c_void_p(context), -1, counts, 512)
    return sum(counts[0 : 2 * n_layer : 2]), sum(counts[1 : 2 * n_layer : 2])


if __name__ == "__main__":
    sys.exit(main())
