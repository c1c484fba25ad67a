"""Miniatures, prompts on which no decision of the router is close, and metadata that chooses its mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import reference
from clear_model import directions_of_no_token, make_loud, save
from numpy.typing import NDArray
from reference import Adaptive, Array, Gating

from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec, write

# n_expert, experts per token
Shape = tuple[int, int]
# a checkpoint and its GGUF
Models = dict[Shape, tuple[Path, Path]]
WIDE: Shape = (64, 8)
NARROW: Shape = (16, 4)
N_VOCAB = 1790
# Decisions of a float32 router differ from those of float64 below about 1e-7.
MARGIN = 1e-6
# Flash attention rounds keys and values to F16, which moves a probability by about 1e-5.
FLASH_MARGIN = 1e-4
MAX_SEEDS = 30

ALL_TOKENS = range(N_VOCAB)
# The tokens of clear_models.
CLEAR_TOKENS = range(300, 396)
# Their embeddings beside what a layer adds, which is about 1.
LOUD = 40.0
# Logits of the second expert and those after it below the first: ranks of neighbours are 0.15 apart or more, and that
# far from the thresholds 0.5, 0.3 and 0.1, which are 0.69, 1.20 and 2.30.
LEVELS = -np.array([0.2, 0.4, 0.85, 1.0, 1.45, 1.65, 1.85, 2.05, 2.6, 2.8])


@dataclass(frozen=True)
class Case:
    """A prompt of `n_tokens` random tokens for a model of `shape`."""

    shape: Shape
    n_tokens: int
    gating: Gating
    seed: int = 0
    tokens: range = ALL_TOKENS

    @property
    def ids(self) -> list[int]:
        drawn = np.random.default_rng(self.seed).integers(0, len(self.tokens), self.n_tokens)
        return [self.tokens[int(i)] for i in drawn]

    def __str__(self) -> str:
        mode = (
            self.gating if isinstance(self.gating, str) else f"adaptive {self.gating.minimum} {self.gating.threshold}"
        )
        return f"{self.shape[1]} of {self.shape[0]}, {self.n_tokens} tokens, {mode}"


def models(folder: Path) -> Models:
    """Write a checkpoint and an F32 GGUF of each shape: n_embd and the experts' width are whole quantization blocks."""
    made = {}
    for shape in (WIDE, NARROW):
        checkpoint = write(folder / f"checkpoint-{shape[0]}", _spec(shape, tied=True))
        made[shape] = checkpoint, _converted(checkpoint)
    return made


def clear_models(folder: Path) -> Models:
    """Write the same with routers that decide nothing narrowly on prompts of CLEAR_TOKENS.

    Random ones have a choice closer than FLASH_MARGIN in nearly every prompt of 200 tokens.
    """
    made = {}
    for shape in (WIDE, NARROW):
        checkpoint = write(folder / f"checkpoint-{shape[0]}", _spec(shape, tied=False))
        decide_clearly(checkpoint, shape)
        made[shape] = checkpoint, _converted(checkpoint)
    return made


def decide_clearly(checkpoint: Path, shape: Shape) -> None:
    """Replace routers and head of a checkpoint: of CLEAR_TOKENS the routers decide nothing narrowly, by the token.

    The head is at right angles to their embeddings, so that logits follow only from what attention and experts add,
    and of their usual size.
    """
    weights, rng, tokens = reference.read_safetensors(checkpoint), np.random.default_rng(0), np.array(CLEAR_TOKENS)
    inverse = make_loud(weights, tokens, LOUD)
    for name, value in weights.items():
        if name.endswith("gate.wg.weight"):
            value[:] = (inverse @ _router_logits(shape, rng)).T
    directions = directions_of_no_token(weights, tokens)
    rows = rng.standard_normal((len(weights["lm_head.weight"]), len(directions)))
    save(checkpoint, weights | {"lm_head.weight": 3 * LOUD / np.sqrt(len(directions)) * rows @ directions})


def _spec(shape: Shape, *, tied: bool) -> Spec:
    n_expert, n_used = shape
    return Spec(
        n_layer=2, n_embd=128, head_dim=32, n_ff=96, n_expert=n_expert, n_expert_used=n_used, tied=tied, dtype="F32"
    )


def _converted(checkpoint: Path) -> Path:
    gguf = checkpoint.with_suffix(".gguf")
    convert(ConvertOptions(checkpoint, gguf, quant="F32"))
    return gguf


def _router_logits(shape: Shape, rng: np.random.Generator) -> Array:
    """Give logits [n_tokens, E]: LEVELS for the experts of a token, and less for the others."""
    n_expert, n_used = shape
    result = np.empty((len(CLEAR_TOKENS), n_expert))
    for row in result:
        used = [0.0, *-np.sort(-rng.choice(LEVELS, n_used - 1, replace=False))]
        rest = used[-1] - 0.4 - rng.random(n_expert - n_used)
        # a race that the first experts win more often, so that capacity has something to drop
        order = np.argsort(rng.exponential(1 + np.arange(n_expert) / 8))
        row[order] = np.concatenate([used, rest])
    return result


class Clear(NamedTuple):
    """A prompt, and what the reference says: logits [T, n_vocab], and p [T, n_expert] of each layer's router."""

    ids: list[int]
    logits: Array
    probabilities: list[Array]


@cache
def clear(checkpoint: Path, case: Case, n_prompt: int | None = None, margin: float = MARGIN) -> Clear:
    """Take the first seed, from the case's own on, whose prompt leaves the reference's router no close decision.

    None is closer than `margin`, in probability. From token `n_prompt` on the tokens were decoded one by one.
    """
    for seed in range(case.seed, case.seed + MAX_SEEDS):
        ids = replace(case, seed=seed).ids
        probabilities: list[Array] = []
        logits = reference.logits(checkpoint, ids, gating=case.gating, n_prompt=n_prompt, probabilities=probabilities)
        if not close_tokens([p[:n_prompt] for p in probabilities], case, margin).any():
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
