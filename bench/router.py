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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD_DIM, N_EXPERT, N_USED = 4096, 3072, 32, 8, 128, 64, 8
N_VOCAB = 128167
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
        write(gguf, n_layer)
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


# -- the file --------------------------------------------------------------------------------------------------------


def layers_that_fit() -> int:
    # MemAvailable counts the page cache, which gives way: the file's own pages may fill it from the run before
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return max(1, min(32, int(kib * 1024 / 2 / 1.45e9)))


def write(out: Path, n_layer: int) -> None:
    """Write the file: the types of Q4_K_M, random numbers, the same in every layer; it appears whole."""
    import gguf

    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "hunyuan-moe")
    metadata(writer, n_layer)
    for name, kind, shape in tensors(n_layer):
        writer.add_tensor(name, weights(kind, *shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(out)


def metadata(writer: Any, n_layer: int) -> None:
    from gguf import TokenType

    writer.add_context_length(32768)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layer)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_freq_base(11158839.92507748)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(N_FF)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_USED)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_expert_shared_feed_forward_length(N_FF)
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(code) for code in (*plain, *range(256, 256 + 256 - len(plain)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("hunyuan")
    writer.add_token_list([*letters, *(f"t{i}" for i in range(N_VOCAB - len(letters)))])
    writer.add_token_types([TokenType.NORMAL] * N_VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def tensors(n_layer: int) -> Iterator[tuple[str, GGMLQuantizationType, tuple[int, ...]]]:
    """Give name, type and row-major shape; Q6_K where llama.cpp's Q4_K_M has it, in half of the layers."""
    from gguf import GGMLQuantizationType as Type

    q, kv = N_HEAD * HEAD_DIM, N_HEAD_KV * HEAD_DIM
    yield "token_embd.weight", Type.Q6_K, (N_VOCAB, N_EMBD)
    yield "output_norm.weight", Type.F32, (N_EMBD,)
    for layer in range(n_layer):
        better = Type.Q6_K if layer % 2 == 0 else Type.Q4_K
        for name, kind, shape in (
            *(("attn_norm", Type.F32, (N_EMBD,)), ("ffn_norm", Type.F32, (N_EMBD,))),
            *(("attn_q_norm", Type.F32, (HEAD_DIM,)), ("attn_k_norm", Type.F32, (HEAD_DIM,))),
            *(("attn_q", Type.Q4_K, (q, N_EMBD)), ("attn_k", Type.Q4_K, (kv, N_EMBD))),
            *(("attn_v", better, (kv, N_EMBD)), ("attn_output", Type.Q4_K, (N_EMBD, q))),
            ("ffn_gate_inp", Type.F32, (N_EXPERT, N_EMBD)),
            *(("ffn_gate_shexp", Type.Q4_K, (N_FF, N_EMBD)), ("ffn_up_shexp", Type.Q4_K, (N_FF, N_EMBD))),
            ("ffn_down_shexp", better, (N_EMBD, N_FF)),
            ("ffn_gate_exps", Type.Q4_K, (N_EXPERT, N_FF, N_EMBD)),
            ("ffn_up_exps", Type.Q4_K, (N_EXPERT, N_FF, N_EMBD)),
            ("ffn_down_exps", better, (N_EXPERT, N_EMBD, N_FF)),
        ):
            yield f"blk.{layer}.{name}.weight", kind, shape


_made: dict[tuple[Any, ...], Any] = {}


def weights(kind: GGMLQuantizationType, *shape: int) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Give values of a standard deviation of about 0.015, norms of 1; the same array for the same type and shape."""
    if (kind, shape) not in _made:
        _made[kind, shape] = make(kind, shape)
    found: NDArray[np.uint8] | NDArray[np.float32] = _made[kind, shape]
    return found


def make(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> NDArray[np.uint8] | NDArray[np.float32]:
    import numpy as np
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Type

    random = np.random.default_rng(len(_made))
    if kind == Type.F32:
        values = np.ones(shape) if len(shape) == 1 else 0.015 * random.standard_normal(shape)
        return values.astype(np.float32)
    per_block, size = GGML_QUANT_SIZES[kind]
    n_blocks = int(np.prod(shape)) // per_block
    blocks = np.frombuffer(random.bytes(n_blocks * size), np.uint8).reshape(n_blocks, size).copy()
    # Q4_K: value = d * scale * quant - dmin * minimum, d and dmin in front; Q6_K: d * scale * (quant - 32), d last
    if kind == Type.Q4_K:
        blocks[:, :4] = np.frombuffer(np.array([7.5e-5, 5.6e-4], np.float16).tobytes(), np.uint8)
    else:
        blocks[:, -2:] = np.frombuffer(np.array([1.1e-5], np.float16).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], shape[-1] // per_block * size)


if __name__ == "__main__":
    sys.exit(main())
