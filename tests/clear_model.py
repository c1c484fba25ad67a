"""A miniature that decides nothing narrowly: what it says depends on its experts, and not on how a device rounds.

Random weights, but for three things. The token embedding is large beside what the layers add, and the routers are
solved so that every token of the prompt and the answers has experts of well separated probabilities. The experts'
values lie on a grid that Q4_K holds, so that one file says the same as F32 and as Q4_K. And the head is solved so that
each router mode says an answer of its own: its rows are at right angles to the embeddings, so that a next token follows
only from what attention and experts have added. Both margins are checked in the float64 reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import large_model
import large_reference
import numpy as np
import reference
from large_model import Large
from numpy.typing import NDArray
from reference import Adaptive, Array, Gating
from safetensors.numpy import save_file

from hymoe.convert import miniature
from hymoe.convert.miniature import Spec

N_PROMPT, N_ANSWER = 512, 32
GATINGS: dict[str, Gating] = {"topk": "topk", "capacity": "capacity", "adaptive": Adaptive(2, 0.3)}
SPEC = Spec(n_layer=2, n_embd=256, n_ff=256, n_expert=16, n_expert_used=4, tied=False, dtype="F32")
LARGE = Large(n_expert=16, tied=False)
# Logits: of the right next token where every other has at most SURE - MARGIN; and between the router's candidates.
SURE, MARGIN = 10.0, 8.0
ROUTER_MARGIN = 0.2
# Hunyuan-Large's one choice of an expert, as a probability.
TOP_1_MARGIN = 0.05
# Largest row of the head: what an error in the hidden state, which has the length sqrt(n_embd), may become in a logit.
STEEP = 1000.0
# Each embedding beside what a layer adds, which is about 1.
LOUD = 20.0
FIRST_TOKEN = 300


@dataclass(frozen=True)
class Clear:
    """A checkpoint, a prompt for it, and the answer that the reference gives in each mode."""

    checkpoint: Path
    prompt: list[int]
    answers: dict[str, list[int]]


def write(folder: Path) -> Clear:
    """Write the checkpoint. Raises AssertionError where a decision of the reference is close."""
    rng = np.random.default_rng(0)
    miniature.write(folder, SPEC)
    weights = reference.read_safetensors(folder)
    tokens = FIRST_TOKEN + np.arange(1 + N_ANSWER * len(GATINGS))
    prompt = [*map(int, rng.choice(tokens, N_PROMPT - 1)), int(tokens[0])]
    answers = {mode: [int(t) for t in part] for mode, part in zip(GATINGS, np.split(tokens[1:], 3), strict=True)}
    made = Clear(folder, prompt, answers)
    _shape(weights, tokens, 0.45, rng)
    save(folder, weights | {"lm_head.weight": _window(weights)})
    states = np.concatenate([_said(made, mode)[:, : SPEC.n_embd] for mode in GATINGS])
    following = [token for answer in answers.values() for token in answer]
    save(folder, weights | {"lm_head.weight": _head(weights, tokens, states, following)})
    for mode in GATINGS:
        _check_answer(_said(made, mode), answers[mode])
    return made


def write_large(folder: Path) -> Clear:
    """Write the same of Hunyuan-Large's form, F32; it has one mode."""
    rng = np.random.default_rng(0)
    weights = {name: value.astype(np.float64) for name, value in large_model.write(folder, LARGE).items()}
    tokens = FIRST_TOKEN + np.arange(1 + N_ANSWER)
    prompt, answer = [*map(int, rng.choice(tokens, N_PROMPT - 1)), int(tokens[0])], [int(t) for t in tokens[1:]]

    def said() -> Array:
        logits, margin = large_reference.forward(folder, [*prompt, *answer[:-1]])
        assert margin > TOP_1_MARGIN, f"a close choice of experts, {margin}"
        return logits[N_PROMPT - 1 :]

    _shape(weights, tokens, 1.5, rng)
    save(folder, weights | {"lm_head.weight": _window(weights)})
    states = said()[:, : LARGE.n_embd]
    save(folder, weights | {"lm_head.weight": _head(weights, tokens, states, answer)})
    _check_answer(said(), answer)
    return Clear(folder, prompt, {"topk": answer})


def _shape(weights: dict[str, Array], tokens: NDArray[np.int64], gap: float, rng: np.random.Generator) -> None:
    inverse = make_loud(weights, tokens, LOUD)
    for name, value in weights.items():
        if name.endswith("gate.wg.weight"):
            value[:] = (inverse @ _router_logits(len(tokens), gap, rng)).T
        elif ".experts." in name:
            value[:] = _grid(value.shape, rng)
        elif "shared_mlp.down" in name or "o_proj" in name:
            value[:] = 0.3 * value


def make_loud(weights: dict[str, Array], tokens: NDArray[np.int64], loudness: float) -> Array:
    """Scale the embeddings to `loudness` beside what a layer adds, about 1, and set the layers' norms to 1.

    Gives the inverse [n_embd, n_tokens] of the normed embeddings of `tokens`, of which there are fewer than n_embd:
    a router made with it says of a token what it was made for, give or take what the layers add.
    """
    for name, value in weights.items():
        if name.endswith(("model.norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight")):
            value[:] = 1.0
    embeddings = weights["model.embed_tokens.weight"]
    embeddings *= loudness / embeddings.std()
    loud = embeddings[tokens]
    inverse: Array = np.linalg.pinv(loud / np.sqrt(np.mean(loud * loud, axis=-1, keepdims=True)))
    return inverse


def directions_of_no_token(weights: dict[str, Array], tokens: NDArray[np.int64]) -> Array:
    """Orthonormal directions [n_embd - n_tokens, n_embd] in which the embeddings of `tokens` have nothing."""
    directions: Array = np.linalg.svd(weights["model.embed_tokens.weight"][tokens])[2][len(tokens) :]
    return directions


def _router_logits(n_tokens: int, gap: float, rng: np.random.Generator) -> Array:
    """Give logits [n_tokens, E], the first k of a token `gap` apart; one or two are above adaptive's threshold."""
    k = SPEC.n_expert_used
    result = np.empty((n_tokens, SPEC.n_expert))
    for token, row in enumerate(result):
        ranked = -gap * np.arange(SPEC.n_expert)
        # the prompt's last token, the first here, must lose something for the modes to differ
        n_kept = int(rng.integers(1, 3)) if token else 2
        ranked[n_kept:k] = -1.6 - gap * np.arange(k - n_kept)
        ranked[k:] = ranked[k - 1] - 1.5 - rng.random(SPEC.n_expert - k)
        # favourites, so that capacity has something to drop
        popular = rng.permutation(SPEC.n_expert) + np.where(np.arange(SPEC.n_expert) < k, -4, 0)
        order = np.argsort(popular + rng.random(SPEC.n_expert))
        row[np.concatenate([rng.permutation(order[:k]), order[k:]])] = ranked
    return result


def _grid(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Sixteen levels, both ends of which are in each block of 32: one scale and one minimum of Q4_K for all."""
    levels = rng.integers(-8, 8, shape)
    levels[..., 0::32], levels[..., 1::32] = -8, 7
    result: Array = levels / (levels.std() * np.sqrt(shape[-1]))
    return result


def _window(weights: dict[str, Array]) -> Array:
    """Give the head whose first logits are the hidden state itself."""
    head = np.zeros_like(weights["lm_head.weight"])
    np.fill_diagonal(head, 1.0)
    return head


def _head(weights: dict[str, Array], tokens: NDArray[np.int64], states: Array, following: list[int]) -> Array:
    """Solve for the head [n_vocab, n_embd]: `following` after `states` [n, n_embd], and nothing from embeddings."""
    directions = directions_of_no_token(weights, tokens)
    head = np.zeros_like(weights["lm_head.weight"])
    head[following] = SURE * np.linalg.pinv(states @ directions.T).T @ directions
    steepest = np.linalg.norm(head, axis=-1).max()
    assert steepest < STEEP, f"two states are hardly apart: {steepest}"
    return head


def save(folder: Path, weights: dict[str, Array]) -> None:
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, folder / "model.safetensors")


def _said(made: Clear, mode: str) -> Array:
    """Logits [N_ANSWER, n_vocab] of the positions that say the answer; checks the router's margins on the way."""
    probabilities: list[Array] = []
    ids = [*made.prompt, *made.answers[mode][:-1]]
    logits = reference.logits(
        made.checkpoint, ids, gating=GATINGS[mode], n_prompt=N_PROMPT, probabilities=probabilities
    )
    for p in probabilities:
        ranked = np.sort(np.log(p), axis=-1)[:, : -SPEC.n_expert_used - 2 : -1]
        gaps = [a - b for a, b in pairwise(ranked.T)]
        gating = GATINGS[mode]
        if isinstance(gating, Adaptive):
            gaps += list(np.abs(ranked - ranked[:, :1] - np.log(gating.threshold)).T)
        assert np.min(gaps) > ROUTER_MARGIN, f"{mode}: a close choice of experts, {np.min(gaps)}"
    return logits[N_PROMPT - 1 :]


def _check_answer(logits: Array, answer: list[int]) -> None:
    right = logits[np.arange(N_ANSWER), answer].copy()
    logits[np.arange(N_ANSWER), answer] = -np.inf
    assert np.min(right - logits.max(axis=-1)) > MARGIN, "a close choice of tokens"
