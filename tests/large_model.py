"""A tiny Hunyuan-Large checkpoint of random weights, as published: names and shapes spelled out once more."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from hymoe.convert import miniature

RANKS = miniature.vocabulary(miniature.Spec())
N_TOKENS = len(RANKS) + 5 + 204
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Large:
    """A tiny checkpoint of the published form; as there, heads are n_embd / n_head wide, unless head_dim says else."""

    n_layer: int = 4
    n_embd: int = 160
    n_head: int = 2
    n_head_kv: int = 1
    head_dim: int = 80
    n_ff: int = 96
    n_expert: int = 5
    n_expert_used: int = 1
    factor: int = 2
    cla: bool = True
    tied: bool = True
    n_spare: int = 18


def config(spec: Large) -> dict[str, Any]:
    """With the published keys (eos_token_id 2 is a default of the class and wrong)."""
    made = {
        "architectures": ["HunYuanForCausalLM"],
        "model_type": "hunyuan",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cla_share_factor": spec.factor,
        "hidden_act": "silu",
        "hidden_size": spec.n_embd,
        "intermediate_size": spec.n_ff,
        "max_position_embeddings": 131072,
        "moe_drop_tokens": False,
        "moe_topk": spec.n_expert_used,
        "num_attention_heads": spec.n_head,
        "num_experts": spec.n_expert,
        "num_hidden_layers": spec.n_layer,
        "num_key_value_heads": spec.n_head_kv,
        "num_shared_expert": 1,
        "pad_token_id": len(RANKS) + 4,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        "rope_theta": 10000.0,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": "bfloat16",
        "use_cla": spec.cla,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "vocab_size": N_TOKENS + spec.n_spare,
    }
    return made if spec.head_dim * spec.n_head == spec.n_embd else made | {"head_dim": spec.head_dim}


def tensors(spec: Large) -> dict[str, Array]:
    """Every tensor with random values: names and shapes as Tencent's modeling_hunyuan.py makes them.

    Matrices keep the size of what they are applied to; norms are 1 give or take, so that it shows whose are taken.
    """
    rng = np.random.default_rng(1)
    d, q, kv = spec.n_embd, spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (N_TOKENS + spec.n_spare, d),
        "model.norm.weight": (d,),
    }
    if not spec.tied:
        shapes["lm_head.weight"] = (N_TOKENS + spec.n_spare, d)
    for layer in range(spec.n_layer):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.o_proj": (d, q),
            "self_attn.query_layernorm": (spec.head_dim,),
            "self_attn.key_layernorm": (spec.head_dim,),
            "mlp.gate.wg": (spec.n_expert, d),
        }
        if not spec.cla or layer % spec.factor == 0:
            parts |= {"self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        for expert in ("shared_mlp", *(f"experts.{e}" for e in range(spec.n_expert))):
            parts |= {f"mlp.{expert}.{part}_proj": (spec.n_ff, d) for part in ("gate", "up")}
            parts[f"mlp.{expert}.down_proj"] = (d, spec.n_ff)
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return {name: _random(rng, shape) for name, shape in shapes.items()}


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    values = rng.standard_normal(shape, np.float32)
    scaled = values / shape[-1] ** 0.5 if len(shape) > 1 else 1 + values / 3
    return scaled.astype(np.float32)


def write(folder: Path, spec: Large, weights: dict[str, Array] | None = None) -> dict[str, Array]:
    """Write the checkpoint, with random weights where none are given; gives them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(spec)))
    generation = {
        "eos_token_id": [len(RANKS) + 3, len(RANKS) + 10],
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.6,
        "repetition_penalty": 1.05,
        "temperature": 0.7,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(RANKS))
    (folder / "hy.tiktoken").write_bytes(b"".join(lines))
    weights = tensors(spec) if weights is None else weights
    save_file(weights, folder / "model.safetensors")
    return weights
