"""Miniatures, prompts on which no decision of the router is close, and metadata that chooses its mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import reference
from numpy.typing import NDArray
from reference import Adaptive, Array, Gating

from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec, write

# n_expert, experts per token
Shape = tuple[int, int]
WIDE: Shape = (64, 8)
NARROW: Shape = (16, 4)
N_VOCAB = 1790
# Decisions of a float32 router differ from those of float64 below about 1e-7.
MARGIN = 1e-6
MAX_SEEDS = 30


@dataclass(frozen=True)
class Case:
    """A prompt of `n_tokens` random tokens for a model of `shape`."""

    shape: Shape
    n_tokens: int
    gating: Gating
    seed: int = 0

    @property
    def ids(self) -> list[int]:
        return [int(token) for token in np.random.default_rng(self.seed).integers(0, N_VOCAB, self.n_tokens)]

    def __str__(self) -> str:
        mode = (
            self.gating if isinstance(self.gating, str) else f"adaptive {self.gating.minimum} {self.gating.threshold}"
        )
        return f"{self.shape[1]} of {self.shape[0]}, {self.n_tokens} tokens, {mode}"


def models(folder: Path) -> dict[Shape, tuple[Path, Path]]:
    """Write a checkpoint and an F32 GGUF of each shape: n_embd and the experts' width are whole quantization blocks."""
    made = {}
    for shape in (WIDE, NARROW):
        n_expert, n_used = shape
        checkpoint, gguf = folder / f"checkpoint-{n_expert}", folder / f"{n_expert}.gguf"
        spec = Spec(n_layer=2, n_embd=128, head_dim=32, n_ff=96, n_expert=n_expert, n_expert_used=n_used, dtype="F32")
        write(checkpoint, spec)
        convert(ConvertOptions(checkpoint, gguf, quant="F32"))
        made[shape] = checkpoint, gguf
    return made


class Clear(NamedTuple):
    """A prompt, and what the reference says: logits [T, n_vocab], and p [T, n_expert] of each layer's router."""

    ids: list[int]
    logits: Array
    probabilities: list[Array]


@cache
def clear(checkpoint: Path, case: Case, n_prompt: int | None = None) -> Clear:
    """Take the first seed, from the case's own on, whose prompt leaves the reference's router no close decision.

    From token `n_prompt` on the tokens were decoded one by one.
    """
    for seed in range(case.seed, case.seed + MAX_SEEDS):
        ids = replace(case, seed=seed).ids
        probabilities: list[Array] = []
        logits = reference.logits(checkpoint, ids, gating=case.gating, n_prompt=n_prompt, probabilities=probabilities)
        if not close_tokens([p[:n_prompt] for p in probabilities], case, MARGIN).any():
            return Clear(ids, logits, probabilities)
    raise AssertionError(f"{case}: every prompt has a close decision")


def close_tokens(probabilities: Sequence[Array], case: Case, margin: float) -> NDArray[np.bool_]:
    """Mark the tokens [T] that have a close decision in some layer."""
    calls = [reference.close_calls(p, case.shape[1], case.gating, margin) for p in probabilities]
    result: NDArray[np.bool_] = np.any(calls, axis=0)
    return result


def overrides(gating: Gating) -> dict[str, str]:
    """Give the metadata that asks for a gating, as --override-kv writes it."""
    prefix = "hunyuan-moe.router"
    if not isinstance(gating, Adaptive):
        return {f"{prefix}.mode": f"str:{gating}"}
    return {
        f"{prefix}.mode": "str:adaptive",
        f"{prefix}.min_experts": f"int:{gating.minimum}",
        f"{prefix}.threshold": f"float:{gating.threshold}",
    }
