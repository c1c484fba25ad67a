"""Hunyuan-A13B from every published format in the engine: its logits are those of the exact floats that it means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import reference
from convert.quantized import SCHEMES, SPEC, Awq, Gptq, Scheme
from engine_eval import evaluate

from convert import quantized
from hymoe.convert import miniature
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec
from hymoe.runtime.server import ServerOptions, serve

pytestmark = pytest.mark.engine

IDS = [int(token) for token in np.random.default_rng(1).integers(0, 300, 60)]
PLAIN = "bf16"
# Four bits want larger scales for a model whose layers have a say in its logits.
LIVELY: dict[str, Scheme] = {
    "gptq": Gptq(max_scale=4e-2),
    "gptq without g_idx": Gptq(order=None, desc_act=False, max_scale=4e-2),
    "gptq asymmetric": Gptq(sym=False, max_scale=4e-2),
    "awq": Awq(max_scale=4e-2),
}
FORMATS = [PLAIN, "fp8", "fp8 per output", "compressed-tensors", *LIVELY, "gptq int8"]
# F32 weights and F32 KV, 1e-12 here: what is left is the rounding of float32 sums.
F32_BOUND = 1e-9
# BF16 rounds weights and activations to 8 bits.
BF16_BOUND = 1e-3
# Types of 4 and 6 bits, for weights that are random in every bit: 0.04 to 0.4 here. Other weights are far from that.
Q4_K_M_BOUND, OTHER_WEIGHTS = 1.0, 4.0
# Every expert answers: no close choice turns over and hides what the rounding of weights costs.
ALL_ANSWER = replace(SPEC, n_expert_used=SPEC.n_expert)


def written(folder: Path, name: str, spec: Spec) -> tuple[Path, Path]:
    """Write a checkpoint of the format; give it, and the plain one of the values that it means."""
    if name == PLAIN:
        plain = miniature.write(folder / "in", replace(spec, dtype="BF16"))
        return plain, plain
    return quantized.write(folder, LIVELY.get(name, SCHEMES[name]), spec), folder / "exact"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("quant", "spec", "bound"), [("F32", SPEC, F32_BOUND), ("BF16", ALL_ANSWER, BF16_BOUND)], ids=["F32", "BF16"]
)
def test_logits(quant: str, spec: Spec, bound: float, name: str, tmp_path: Path) -> None:
    checkpoint, exact = written(tmp_path, name, spec)
    convert(ConvertOptions(checkpoint, tmp_path / "out.gguf", quant=quant))
    (got,) = evaluate(tmp_path / "out.gguf", [IDS])
    assert reference.kl(reference.logits(exact, IDS), got) <= bound


@pytest.mark.parametrize("name", [PLAIN, "fp8", "gptq", "awq"])
def test_straight_to_q4_k_m(name: str, tmp_path: Path) -> None:
    spec = replace(ALL_ANSWER, n_embd=256, n_head=8, n_ff=256)
    checkpoint, exact = written(tmp_path, name, spec)
    gguf = tmp_path / "out.gguf"
    convert(ConvertOptions(checkpoint, gguf, quant="Q4_K_M"))
    (got,) = evaluate(gguf, [IDS])
    assert reference.kl(reference.logits(exact, IDS), got) <= Q4_K_M_BOUND
    other = miniature.write(tmp_path / "other", replace(spec, seed=spec.seed + 1, dtype="BF16"))
    assert reference.kl(reference.logits(other, IDS), got) >= OTHER_WEIGHTS
    with serve(ServerOptions(gguf, port=0, ctx=512, threads=1)) as endpoint:
        body = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 16}
        answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json()
    assert 1 <= answer["usage"]["completion_tokens"] <= 16
    assert answer["choices"][0]["finish_reason"] in {"stop", "length"}
