"""The engine's logits on converted checkpoints against the float64 reference, which reads the checkpoint itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from engine_eval import evaluate
from reference import Array

from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec, write

pytestmark = pytest.mark.engine

N_TOKENS = 200
IDS = [int(token) for token in np.random.default_rng(1).integers(0, 2000, N_TOKENS)]
# From 257 tokens on the engine sees a cache of 512 and attends in its own way.
N_BEFORE = 257
MANY_IDS = [int(token) for token in np.random.default_rng(2).integers(0, 2000, 600)]
SMALL: dict[str, Any] = {"n_layer": 2, "n_embd": 128, "head_dim": 32, "n_ff": 96, "n_expert": 8, "dtype": "F32"}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two shared experts": {"n_shared": 2},
    "experts of their own width": {"n_ff": 128, "n_ff_exp": 64},
    "untied head": {"tied": False},
    "no alpha": {"alpha": None},
    "saved by transformers 5": {"config_style": "transformers5"},
    "heads wider than the hidden size": {"n_head": 8, "n_head_kv": 1},
    "every expert answers": {"n_expert": 4, "n_expert_used": 4},
    "shards": {"max_shard_bytes": 1 << 20},
}

ATTENDING: dict[str, dict[str, Any]] = {
    "two heads share": {},
    "eight heads share": {"n_head": 8, "n_head_kv": 1},
    "none shares": {"n_head_kv": 4},
    "heads of 80": {"head_dim": 80},
    "heads of 128": {"head_dim": 128},
}

# F32 weights and F32 KV: what is left is the rounding of float32 sums, 1e-12 here.
F32_BOUND = 1e-9
# Flash attention rounds K and V to F16: 1e-6 here.
FLASH_BOUND = 1e-5
# A cache of F16 and everything else in F32: 2e-7 here; with sums of values in F16, as stock's, 6e-6 to 1e-4.
CACHE_BOUND = 1e-6
# Of a quantized cache: 1.3e-4 to 1.4e-4 with Q8_0, where queries in Q8_0 too, as stock's, make 2.1e-4 to 2.4e-4;
# 6.5e-3 with Q5_1 and 3.4e-2 with Q4_0, which says that the right values are read.
QUANTIZED_BOUNDS = {"q8_0": 1.7e-4, "q5_1": 8e-3, "q4_0": 4e-2}
# BF16 products round every activation to 8 bits too: 1.0e-4 to 1.2e-4 over six seeds where all experts answer. (Where
# some are chosen, a close choice that turns over costs up to 5e-3, which says nothing about the arithmetic.)
BF16_BOUND = 1e-3


def converted(folder: Path, quant: str = "F32", **changes: Any) -> tuple[Path, Path]:
    checkpoint, gguf = folder / "checkpoint", folder / f"{quant}.gguf"
    write(checkpoint, Spec(**{**SMALL, **changes}))
    convert(ConvertOptions(checkpoint, gguf, quant=quant))
    return checkpoint, gguf


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """Give the F32 file of the plain variant and what the reference says about it."""
    checkpoint, gguf = converted(tmp_path_factory.mktemp("plain"))
    return gguf, reference.logits(checkpoint, IDS)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_f32(tmp_path: Path, changes: dict[str, Any]) -> None:
    checkpoint, gguf = converted(tmp_path, **changes)
    (got,) = evaluate(gguf, [IDS])
    assert reference.kl(reference.logits(checkpoint, IDS), got) <= F32_BOUND


def test_flash_attention(plain: tuple[Path, Array]) -> None:
    gguf, wanted = plain
    (got,) = evaluate(gguf, [IDS], flash_attn=True)
    assert reference.kl(wanted, got) <= FLASH_BOUND


@pytest.mark.parametrize("changes", ATTENDING.values(), ids=ATTENDING.keys())
def test_one_token_attends_to_many(tmp_path: Path, changes: dict[str, Any]) -> None:
    """With one to three threads, each with a part of the cache, the last of which is empty at first."""
    checkpoint, gguf = converted(tmp_path, n_expert=4, n_expert_used=4, **changes)  # no close choice that turns over
    wanted = reference.logits(checkpoint, MANY_IDS)[N_BEFORE:]
    for n_threads in (1, 2, 3):
        (got,) = evaluate(gguf, [MANY_IDS], flash_attn=True, kv="f16", n_prompt=N_BEFORE, n_threads=n_threads)
        assert reference.kl(wanted, got[N_BEFORE:]) <= CACHE_BOUND


# Tokens of a ubatch and threads: whole pieces of 64 and what is left over; pieces of fewer, so that each thread has
# some; and fewer tokens than a piece.
@pytest.mark.parametrize(("n_ubatch", "n_threads"), [(150, 1), (150, 7), (20, 1)])
@pytest.mark.parametrize("changes", ATTENDING.values(), ids=ATTENDING.keys())
def test_many_tokens_attend_to_many(tmp_path: Path, changes: dict[str, Any], n_ubatch: int, n_threads: int) -> None:
    checkpoint, gguf = converted(tmp_path, n_expert=4, n_expert_used=4, **changes)
    wanted = reference.logits(checkpoint, MANY_IDS)
    (got,) = evaluate(gguf, [MANY_IDS], flash_attn=True, kv="f16", n_ubatch=n_ubatch, n_threads=n_threads)
    assert reference.kl(wanted, got) <= CACHE_BOUND


def test_each_sequence_attends_to_its_own(tmp_path: Path) -> None:
    checkpoint, gguf = converted(tmp_path, n_expert=4, n_expert_used=4)
    prompts = [MANY_IDS[at : at + 150] for at in (0, 200, 400)]
    found = evaluate(gguf, prompts, flash_attn=True, kv="f16", n_ubatch=100, together=True)
    for prompt, got in zip(prompts, found, strict=True):
        assert reference.kl(reference.logits(checkpoint, prompt), got) <= CACHE_BOUND


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("kv", QUANTIZED_BOUNDS)
def test_attention_to_a_quantized_cache(tmp_path: Path, kv: str, head_dim: int) -> None:
    checkpoint, gguf = converted(tmp_path, n_expert=4, n_expert_used=4, head_dim=head_dim)
    wanted = reference.logits(checkpoint, MANY_IDS)
    (many,) = evaluate(gguf, [MANY_IDS], flash_attn=True, kv=kv, n_ubatch=150)
    assert reference.kl(wanted, many) <= QUANTIZED_BOUNDS[kv]
    (one,) = evaluate(gguf, [MANY_IDS], flash_attn=True, kv=kv, n_prompt=N_BEFORE, n_threads=2)
    assert reference.kl(wanted, one) <= QUANTIZED_BOUNDS[kv]


def test_prompt_in_pieces(plain: tuple[Path, Array]) -> None:
    gguf, wanted = plain
    (got,) = evaluate(gguf, [IDS], n_ubatch=37)
    assert reference.kl(wanted, got) <= F32_BOUND


def test_bf16(tmp_path: Path) -> None:
    checkpoint, gguf = converted(tmp_path, "BF16", dtype="BF16", n_expert=4, n_expert_used=4)
    (got,) = evaluate(gguf, [IDS])
    assert reference.kl(reference.logits(checkpoint, IDS), got) <= BF16_BOUND


def test_top_1_weighs_with_the_raw_probability(tmp_path: Path) -> None:
    checkpoint, gguf = converted(tmp_path)
    overrides = {"hunyuan-moe.expert_used_count": "int:1", "hunyuan-moe.expert_weights_norm": "bool:false"}
    (got,) = evaluate(gguf, [IDS], overrides=overrides)
    assert reference.kl(reference.logits(checkpoint, IDS, n_expert_used=1), got) <= F32_BOUND


def test_the_reference_drops_what_is_over_capacity() -> None:
    # eight tokens that want the same 2 of 4 experts: room for max(2, 2 * 8 // 4) = 4 of them
    p = np.tile([0.5, 0.3, 0.15, 0.05], (8, 1))
    weight = reference.route(p, 2, "capacity")
    assert np.allclose(weight[:4], [0.625, 0.375, 0, 0])
    assert not weight[4:].any()
    assert np.allclose(reference.route(p, 2, "topk"), [0.625, 0.375, 0, 0])
    assert np.allclose(reference.route(p, 1, "capacity"), [0.5, 0, 0, 0])


def test_the_reference_counts_rank_by_rank() -> None:
    # token 0 wants expert 1 second, the others want it first: the first rank of all tokens is counted before the second
    p = np.array([[0.6, 0.4, 0.0], [0.3, 0.7, 0.0], [0.3, 0.7, 0.0]])
    weight = reference.route(p, 2, "capacity")  # capacity max(2, 2 * 3 // 3) = 2
    assert np.allclose(weight, [[0.6, 0, 0], [0.3, 0.7, 0], [0, 0.7, 0]])
