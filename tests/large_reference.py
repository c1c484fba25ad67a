"""Hunyuan-Large's forward pass in float64 numpy, layer by layer as published.

Definition: Tencent/Tencent-Hunyuan-Large models/modeling_hunyuan.py. Every layer rotates and norms the keys that it
uses with its own weight, whoever projected them. What it has in common with Hunyuan-A13B comes from `reference`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from reference import Array, Settings, experts, log_softmax, read_safetensors, read_settings, rms, rope, route, swiglu


class Forward(NamedTuple):
    """Logits [T, n_vocab], and by how much probability the closest choice of experts was made, over layers and tokens.

    Two close experts make the smallest rounding elsewhere visible, which says nothing about that rounding.
    """

    logits: Array
    margin: float


def forward(folder: Path, ids: Sequence[int]) -> Forward:
    """One prompt `ids`, as published: with one expert its raw probability weighs it, more are normalised."""
    settings, weights, factor = read_settings(folder), read_safetensors(folder), sharing(folder)
    x = weights["model.embed_tokens.weight"][list(ids)]  # [T, n_embd]
    margins = []
    k = v = x  # the owner's keys before rope and norm, and its values: [T, n_head_kv * D]
    for layer in range(settings.n_layer):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        y = rms(x, own["input_layernorm.weight"], settings.rms_eps)
        if layer % factor == 0:
            k, v = y @ own["self_attn.k_proj.weight"].T, y @ own["self_attn.v_proj.weight"].T
        x = x + attention(y, k, v, own, settings)
        y = rms(x, own["post_attention_layernorm.weight"], settings.rms_eps)
        p = np.exp(log_softmax(y @ own["mlp.gate.wg.weight"].T))
        margins.append(closest(p, settings.n_expert_used))
        x = x + swiglu(y, own, "mlp.shared_mlp") + experts(y, own, route(p, settings.n_expert_used, "topk"))
    head = weights["model.embed_tokens.weight" if settings.tied else "lm_head.weight"]
    return Forward(rms(x, weights["model.norm.weight"], settings.rms_eps) @ head.T, min(margins))


def closest(p: Array, n_used: int) -> float:
    """By how much the last expert that answers is likelier than the next, the least over tokens; p [T, E]."""
    if n_used == p.shape[-1]:
        return 1.0
    p = np.sort(p, axis=-1)
    return float(np.min(p[:, -n_used] - p[:, -n_used - 1]))


def sharing(folder: Path) -> int:
    """How many layers share one layer's keys and values; 1 where none do."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config["cla_share_factor"]) if config["use_cla"] else 1


def attention(x: Array, k: Array, v: Array, own: Mapping[str, Array], settings: Settings) -> Array:
    """Causal attention [T, n_embd] -> [T, n_embd] to the raw keys and values [T, n_head_kv * D] of some layer."""
    n_tokens = len(x)
    q = (x @ own["self_attn.q_proj.weight"].T).reshape(n_tokens, settings.n_head, -1)
    k, v = (one.reshape(n_tokens, settings.n_head_kv, -1) for one in (k, v))
    width = q.shape[-1]
    base = settings.rope_theta * (settings.alpha or 1.0) ** (width / (width - 2))
    q = rms(rope(q, base), own["self_attn.query_layernorm.weight"], settings.rms_eps)
    k = rms(rope(k, base), own["self_attn.key_layernorm.weight"], settings.rms_eps)
    mixed = np.empty_like(q)
    ahead = np.triu(np.ones((n_tokens, n_tokens), bool), 1)
    for head in range(settings.n_head):
        group = head * settings.n_head_kv // settings.n_head
        scores = np.where(ahead, -np.inf, q[:, head] @ k[:, group].T / np.sqrt(width))
        mixed[:, head] = np.exp(log_softmax(scores)) @ v[:, group]
    result: Array = mixed.reshape(n_tokens, -1) @ own["self_attn.o_proj.weight"].T
    return result
