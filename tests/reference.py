"""The forward pass of HunYuan's mixture of experts in float64 numpy: what the engine's logits are held against.

It reads the checkpoint under its published names and knows nothing of hymoe, GGUF or llama.cpp, so that an error
cannot cancel out. Definition: Tencent-Hunyuan/Hunyuan-A13B@2798f3c models/modeling_hunyuan.py.

Shapes are row-major: T tokens of one forward, n_head and n_head_kv heads of width D, E experts of which k answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Adaptive:
    """Keep `minimum` experts and every further one with p >= threshold * p_max; their weights are made to sum to 1."""

    minimum: int
    threshold: float


Gating = Literal["topk", "capacity"] | Adaptive

DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16}


@dataclass(frozen=True)
class Settings:
    """What config.json says, in either of its spellings."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert_used: int
    rms_eps: float
    rope_theta: float
    alpha: float | None
    tied: bool


def logits(
    folder: Path,
    ids: Sequence[int],
    *,
    gating: Gating = "topk",
    n_expert_used: int | None = None,
    n_prompt: int | None = None,
    probabilities: list[Array] | None = None,
) -> Array:
    """Logits [T, n_vocab] of all positions of one prompt `ids`.

    `gating` "capacity" drops what the published code drops; `n_expert_used` replaces the config's number. From token
    `n_prompt` on the tokens were decoded one by one, which drops nothing over capacity. Each layer adds what its router
    said, [T, E], to `probabilities`.
    """
    settings = read_settings(folder)
    if n_expert_used is not None:
        settings = replace(settings, n_expert_used=n_expert_used)
    weights = read_safetensors(folder)
    x = weights["model.embed_tokens.weight"][list(ids)]  # [T, n_embd]
    for layer in range(settings.n_layer):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x = x + attention(rms(x, own["input_layernorm.weight"], settings.rms_eps), own, settings)
        y = rms(x, own["post_attention_layernorm.weight"], settings.rms_eps)
        p = np.exp(log_softmax(y @ own["mlp.gate.wg.weight"].T))
        decoded = "topk" if gating == "capacity" else gating
        parts = (p[:n_prompt], gating), (p[n_prompt:] if n_prompt else p[:0], decoded)
        weight = np.concatenate([route(part, settings.n_expert_used, mode) for part, mode in parts])
        x = x + swiglu(y, own, "mlp.shared_mlp") + experts(y, own, weight)
        if probabilities is not None:
            probabilities.append(p)
    head = weights["model.embed_tokens.weight" if settings.tied else "lm_head.weight"]
    return rms(x, weights["model.norm.weight"], settings.rms_eps) @ head.T


def kl(p_logits: NDArray[Any], q_logits: NDArray[Any]) -> float:
    """Mean over positions of KL(p || q) in nats, from two arrays of logits [T, n_vocab]."""
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))


def log_softmax(x: NDArray[Any]) -> Array:
    """Logarithm of the softmax over the last axis, in float64."""
    shifted = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def rms(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis."""
    result: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return result


def rope(x: Array, base: float) -> Array:
    """Rotate [T, heads, D] by position, the first half of a head against the second (NEOX)."""
    n_tokens, _, width = x.shape
    angle = np.arange(n_tokens)[:, None, None] * base ** (-2.0 * np.arange(width // 2) / width)
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def attention(x: Array, own: Mapping[str, Array], settings: Settings) -> Array:
    """Causal attention [T, n_embd] -> [T, n_embd]; queries and keys are normed per head after the rotation."""
    n_tokens = len(x)

    def heads(name: str, n: int) -> Array:
        return (x @ own[f"self_attn.{name}_proj.weight"].T).reshape(n_tokens, n, -1)

    q, k, v = heads("q", settings.n_head), heads("k", settings.n_head_kv), heads("v", settings.n_head_kv)
    width = q.shape[-1]
    base = settings.rope_theta * (settings.alpha or 1.0) ** (width / (width - 2))
    q = rms(rope(q, base), own["self_attn.query_layernorm.weight"], settings.rms_eps)
    k = rms(rope(k, base), own["self_attn.key_layernorm.weight"], settings.rms_eps)
    group = settings.n_head // settings.n_head_kv
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(width)
    scores[:, np.triu(np.ones((n_tokens, n_tokens), bool), 1)] = -np.inf
    mixed = np.einsum("hts,shd->thd", np.exp(log_softmax(scores)), v)
    result: Array = mixed.reshape(n_tokens, -1) @ own["self_attn.o_proj.weight"].T
    return result


def swiglu(x: Array, own: Mapping[str, Array], name: str) -> Array:
    """down(silu(gate(x)) * up(x)): one feed-forward block, [T, n_embd] -> [T, n_embd]."""
    gate = x @ own[f"{name}.gate_proj.weight"].T
    up = x @ own[f"{name}.up_proj.weight"].T
    result: Array = (gate / (1 + np.exp(-gate)) * up) @ own[f"{name}.down_proj.weight"].T
    return result


def experts(x: Array, own: Mapping[str, Array], weight: Array) -> Array:
    """Sum of the routed experts' answers, weighted by [T, E]: [T, n_embd] -> [T, n_embd]."""
    out = np.zeros_like(x)
    for expert in np.flatnonzero(weight.any(axis=0)):
        rows = np.flatnonzero(weight[:, expert])
        out[rows] += weight[rows, expert, None] * swiglu(x[rows], own, f"mlp.experts.{expert}")
    return out


def route(p: Array, n_used: int, gating: Gating) -> Array:
    """Weights [T, E] from probabilities [T, E]: the n_used largest, made to sum to 1; untouched where n_used is 1.

    With "capacity" every expert takes at most max(k, kT div E) pairs, counted rank by rank and token by token inside
    a rank; pairs beyond it are dropped after the normalisation, so that a token's weights may sum to less than 1.
    """
    return weigh(p, np.argsort(-p, axis=-1, kind="stable")[:, :n_used], gating)


def weigh(p: Array, chosen: NDArray[np.int64], gating: Gating) -> Array:
    """Weights [T, E] of the experts `chosen` [T, k], the largest first; see route."""
    n_tokens, n_expert = p.shape
    n_used = chosen.shape[1]
    value = np.take_along_axis(p, chosen, axis=-1)
    if n_used > 1:
        if isinstance(gating, Adaptive):
            small = value < gating.threshold * value[:, :1]
            small[:, : gating.minimum] = False
            value = np.where(small, 0.0, value)
        value = value / value.sum(axis=-1, keepdims=True)
        if gating == "capacity":
            capacity = max(n_used, n_used * n_tokens // n_expert)
            pairs = np.eye(n_expert, dtype=np.int64)[chosen.T.ravel()]  # [kT, E], rank outermost
            before = ((np.cumsum(pairs, axis=0) - pairs) * pairs).sum(axis=-1).reshape(n_used, n_tokens).T
            value = np.where(before < capacity, value, 0.0)
    weight = np.zeros_like(p)
    np.put_along_axis(weight, chosen, value, axis=-1)
    return weight


def close_calls(p: Array, n_used: int, gating: Gating, margin: float) -> NDArray[np.bool_]:
    """Mark the tokens [T] with a decision that a change of `margin` in a probability [T, E] could turn over.

    Two experts of neighbouring ranks that are closer than `margin` count only where exchanging them changes some
    token's weight by more than n_used * margin: less is no decision, but about what the change itself does to weights.
    """
    order = np.argsort(-p, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=-1)
    weight = weigh(p, order[:, :n_used], gating)
    close = np.zeros(len(p), bool)
    for t, r in np.argwhere(-np.diff(ranked[:, : n_used + 1], axis=-1) < margin):
        other = order.copy()
        other[t, [r, r + 1]] = other[t, [r + 1, r]]
        close[t] |= np.abs(weigh(p, other[:, :n_used], gating) - weight).max() > n_used * margin
    if isinstance(gating, Adaptive):
        rest = ranked[:, gating.minimum : n_used]
        close |= (np.abs(rest - gating.threshold * ranked[:, :1]) < margin).any(axis=-1)
    return close


def read_settings(folder: Path) -> Settings:
    """Read config.json as published, or as transformers 5 saves it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope_config = config.get("rope_scaling") or config.get("rope_parameters") or {}
    dynamic = rope_config.get("type", rope_config.get("rope_type")) == "dynamic"
    used = config.get("moe_topk") or config["num_experts_per_tok"]
    return Settings(
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_head_kv=config["num_key_value_heads"],
        n_expert_used=used[0] if isinstance(used, list) else used,
        rms_eps=config["rms_norm_eps"],
        rope_theta=config.get("rope_theta") or rope_config.get("rope_theta") or 10000.0,
        alpha=rope_config.get("alpha") if dynamic else None,
        tied=config["tie_word_embeddings"],
    )


def read_safetensors(folder: Path) -> dict[str, Array]:
    """Read every tensor of every *.safetensors in the folder as float64."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = _widen(raw[start + begin : start + end], entry["dtype"]).reshape(entry["shape"])
    return found


def _widen(raw: bytes, dtype: str) -> Array:
    values = np.frombuffer(raw, DTYPES[dtype])
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
