"""Miniatures and prompts on which no decision of the router is close, and metadata that chooses its mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import reference
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


@dataclass(frozen=True)
class Case:
    """One prompt of `n_tokens` random tokens for a model of `shape`; `seed` is the first whose routing is clear."""

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


def wanted(checkpoint: Path, case: Case, n_prompt: int | None = None) -> Array:
    """Give the reference's logits [T, n_vocab]; a prompt with a close decision is an error of the test's."""
    probabilities: list[Array] = []
    logits = reference.logits(checkpoint, case.ids, gating=case.gating, n_prompt=n_prompt, probabilities=probabilities)
    for p in probabilities:
        assert not reference.close_calls(p[:n_prompt], case.shape[1], case.gating, MARGIN), "choose another seed"
    return logits


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
