"""The run that a fresh engine must survive: quantize a tiny random model and process prompts with it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hymoe.errors import EngineError

if TYPE_CHECKING:
    from hymoe.engine.installed import Engine

ARCHITECTURE: Final = "hunyuan-moe"
# 256 is the smallest row that K-quants take, and wide enough for every tiled kernel of the processor.
WIDTH: Final = 256
N_LAYER: Final = 2
N_EXPERT: Final = 4
N_VOCAB: Final = 512
# A block of 32, one of the K-quants' mixtures, and the plain type that the others start from.
QUANTS: Final = ("F16", "Q8_0", "Q4_K_M")
PROMPTS: Final = (1, 512)
SECONDS: Final = 120


def run(engine: Engine, folder: Path) -> None:
    """Run the check with the tools of `engine`, with files in `folder`.

    Raises EngineError that names the model type and how the tool ended.
    """
    model = folder / "smoke-f16.gguf"
    write_model(model)
    for quant in QUANTS:
        target = model
        if quant != "F16":
            target = folder / f"smoke-{quant}.gguf"
            _call(f"quantizing to {quant}", [engine.tool("llama-quantize"), model, target, quant, "2"])
        sizes = ",".join(str(size) for size in PROMPTS)
        options = ["-v", "-p", sizes, "-n", "0", "-r", "1", "-t", "2", "-ngl", "0", "-o", "json"]
        said = _call(f"prompts of {sizes} tokens on {quant}", [engine.tool("llama-bench"), "-m", target, *options])
        _check_speeds(quant, said)


def write_model(file: Path) -> None:
    """Write a random model of the family without a vocabulary: F16 matrices, F32 vectors."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(WIDTH)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_expert_shared_feed_forward_length(WIDTH)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(WIDTH // 4)
    writer.add_value_length(WIDTH // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    for name, shape in _tensors():
        values = rng.standard_normal(shape, dtype=np.float32) / np.float32(WIDTH**0.5)
        writer.add_tensor(name, np.abs(values) if len(shape) == 1 else values.astype(_stored(name)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(name: str) -> str:
    return "float32" if "ffn_gate_inp" in name else "float16"


def _tensors() -> list[tuple[str, tuple[int, ...]]]:
    """Names and row-major shapes of a model, all widths alike but for the grouped keys and values."""
    square, half = (WIDTH, WIDTH), (WIDTH // 2, WIDTH)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (WIDTH,),
        "attn_q": square,
        "attn_k": half,
        "attn_v": half,
        "attn_q_norm": (WIDTH // 4,),
        "attn_k_norm": (WIDTH // 4,),
        "attn_output": square,
        "ffn_norm": (WIDTH,),
        "ffn_gate_inp": (N_EXPERT, WIDTH),
    }
    for matrix in ("gate", "up", "down"):
        layer[f"ffn_{matrix}_exps"] = (N_EXPERT, WIDTH, WIDTH)
        layer[f"ffn_{matrix}_shexp"] = square
    blocks = [(f"blk.{il}.{name}.weight", shape) for il in range(N_LAYER) for name, shape in layer.items()]
    return [("token_embd.weight", (N_VOCAB, WIDTH)), *blocks, ("output_norm.weight", (WIDTH,))]


def _call(what: str, command: Sequence[str | Path]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise EngineError(f"the smoke run of the new engine hangs ({what})", got=f"no end after {SECONDS} s") from exc
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise EngineError(
            f"the new engine crashes ({what})", got=name, fix="it was not installed; try another compiler (CXX=...)"
        )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in lines if "error" in line), lines[-1] if lines else f"exit status {done.returncode}"
        )
        raise EngineError(f"the smoke run of the new engine failed ({what})", got=reason)
    return done.stdout


def _check_speeds(quant: str, said: str) -> None:
    try:
        got = [row["n_prompt"] for row in json.loads(said) if row["avg_ts"] > 0]
    except (ValueError, KeyError, TypeError) as exc:
        raise EngineError(f"the smoke run on {quant}", got=f"output that is no result of llama-bench ({exc})") from exc
    if got != list(PROMPTS):
        raise EngineError(f"the smoke run on {quant}", got=f"results for prompts of {got}", expected=list(PROMPTS))
