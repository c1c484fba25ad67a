"""Hunyuan-A13B: 80 B parameters, 13 B active; one shared expert, 64 routed ones of which 8 answer.

Definition: Tencent-Hunyuan/Hunyuan-A13B@2798f3c models/modeling_hunyuan.py and transformers 5's
hunyuan_v1_moe. GGUF names are those of llama.cpp's architecture "hunyuan-moe".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hymoe.convert.architectures import Architecture, Key, Row, family
from hymoe.convert.config import Config
from hymoe.errors import UnsupportedError

ARCH = "hunyuan-moe"
N_EXTRA = 205  # <|extra_0|> … <|extra_204|>
BEGIN_TOKEN = "<|bos|>"  # config.json says 1, which is '"'

# alpha -> trained context. The config's max_position_embeddings is that of the first training stage
# (Hunyuan_A13B_Technical_Report.pdf: alpha 1000 was tuned to 256 K).
TRAINED_CONTEXT = {1000.0: 262144}

# --- HPARAMS ---------------------------------------------------------------------------------------------------

# Keys that change the graph, with the values it implements. An absent key is settled by the tensors themselves.
IMPLEMENTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("hidden_act", ("silu",)),
    ("attention_bias", (False,)),
    ("mlp_bias", (False,)),
    ("norm_type", ("rms",)),
    ("use_qk_norm", (True,)),
    ("use_cla", (False,)),
    ("use_mla", (False,)),
    ("use_mixed_mlp_moe", (True,)),
    ("use_rotary_pos_emb", (True,)),
    ("position_embedding_xdrope", (False,)),
    ("norm_topk_prob", (True,)),
    ("group_limited_greedy", (False,)),
    ("routed_scaling_factor", (1.0, 1)),
    ("moe_layer_num_skipped", (0,)),
    ("add_classification_head", (False,)),
)


@dataclass(frozen=True)
class HParams:
    """config.json in the field's terms. Widths are in elements; rope_base is after NTK-alpha scaling."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff_exp: int
    n_ff_shexp: int
    n_expert: int
    n_expert_used: int
    n_shared: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    rope_base: float
    tied: bool


def read_hparams(config: Config) -> HParams:
    """Read and check config.json. Raises CheckpointError or UnsupportedError naming the key."""
    for key, allowed in IMPLEMENTED:
        config.expect(key, *allowed)
    n_layer = config.integer("num_hidden_layers")
    n_embd = config.integer("hidden_size")
    n_head = config.integer("num_attention_heads")
    head_dim = family.head_dim(config, n_embd, n_head)
    n_ff = config.integer("intermediate_size")
    n_shared = config.uniform("num_shared_expert", n_layer=n_layer, default=1)
    hp = HParams(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=config.integer("num_key_value_heads", default=n_head),
        head_dim=head_dim,
        n_ff_exp=config.uniform("moe_intermediate_size", n_layer=n_layer, default=n_ff),
        n_ff_shexp=n_ff * n_shared,
        n_expert=config.uniform("num_experts", "num_local_experts", n_layer=n_layer),
        n_expert_used=config.uniform("moe_topk", "num_experts_per_tok", n_layer=n_layer),
        n_shared=n_shared,
        n_vocab=config.integer("vocab_size"),
        n_ctx_train=family.trained_context(config, TRAINED_CONTEXT),
        rms_eps=config.number("rms_norm_eps"),
        rope_base=family.rope_base(config, head_dim),
        tied=config.flag("tie_word_embeddings", default=False),
    )
    _check(config, hp)
    return hp


def _check(config: Config, hp: HParams) -> None:
    family.check_counts(config, hp.n_head, hp.n_head_kv, hp.n_expert, hp.n_expert_used)
    if hp.n_expert_used < 2:
        raise UnsupportedError(
            f"{config.source}: moe_topk",
            got=hp.n_expert_used,
            expected="at least 2",
            fix="top-1 gating does not normalise its weight, and an unpatched reader of this file would",
        )


# --- NAMES -----------------------------------------------------------------------------------------------------

_L = "model.layers.{l}."
NAMES = (
    Row("model.embed_tokens.weight", "token_embd.weight", ("n_vocab", "n_embd")),
    Row("model.norm.weight", "output_norm.weight", ("n_embd",), "f32"),
    Row("lm_head.weight", "output.weight", ("n_vocab", "n_embd")),
    Row(_L + "input_layernorm.weight", "blk.{l}.attn_norm.weight", ("n_embd",), "f32"),
    Row(_L + "self_attn.q_proj.weight", "blk.{l}.attn_q.weight", ("n_embd_q", "n_embd")),
    Row(_L + "self_attn.k_proj.weight", "blk.{l}.attn_k.weight", ("n_embd_kv", "n_embd")),
    Row(_L + "self_attn.v_proj.weight", "blk.{l}.attn_v.weight", ("n_embd_kv", "n_embd")),
    Row(_L + "self_attn.o_proj.weight", "blk.{l}.attn_output.weight", ("n_embd", "n_embd_q")),
    Row(_L + "self_attn.query_layernorm.weight", "blk.{l}.attn_q_norm.weight", ("head_dim",), "f32"),
    Row(_L + "self_attn.key_layernorm.weight", "blk.{l}.attn_k_norm.weight", ("head_dim",), "f32"),
    Row(_L + "post_attention_layernorm.weight", "blk.{l}.ffn_norm.weight", ("n_embd",), "f32"),
    Row(_L + "mlp.gate.wg.weight", "blk.{l}.ffn_gate_inp.weight", ("n_expert", "n_embd"), "f32"),
    Row(_L + "mlp.shared_mlp.gate_proj.weight", "blk.{l}.ffn_gate_shexp.weight", ("n_ff_shexp", "n_embd")),
    Row(_L + "mlp.shared_mlp.up_proj.weight", "blk.{l}.ffn_up_shexp.weight", ("n_ff_shexp", "n_embd")),
    Row(_L + "mlp.shared_mlp.down_proj.weight", "blk.{l}.ffn_down_shexp.weight", ("n_embd", "n_ff_shexp")),
    Row(_L + "mlp.experts.{e}.gate_proj.weight", "blk.{l}.ffn_gate_exps.weight", ("n_ff_exp", "n_embd")),
    Row(_L + "mlp.experts.{e}.up_proj.weight", "blk.{l}.ffn_up_exps.weight", ("n_ff_exp", "n_embd")),
    Row(_L + "mlp.experts.{e}.down_proj.weight", "blk.{l}.ffn_down_exps.weight", ("n_embd", "n_ff_exp")),
)


def names(hp: HParams) -> tuple[Row, ...]:
    """The rows that this checkpoint has: with tied embeddings a stored lm_head is a copy, and is dropped."""
    return tuple(
        row._replace(gguf=None, optional=True) if hp.tied and row.gguf == "output.weight" else row for row in NAMES
    )


# --- METADATA --------------------------------------------------------------------------------------------------


def metadata(hp: HParams) -> tuple[Key, ...]:
    """Build the architecture's GGUF keys.

    feed_forward_length is the routed experts' width because that is where an unpatched llama.cpp looks for it.
    """
    return (
        Key(f"{ARCH}.block_count", hp.n_layer, "UINT32"),
        Key(f"{ARCH}.context_length", hp.n_ctx_train, "UINT32"),
        Key(f"{ARCH}.embedding_length", hp.n_embd, "UINT32"),
        Key(f"{ARCH}.feed_forward_length", hp.n_ff_exp, "UINT32"),
        Key(f"{ARCH}.attention.head_count", hp.n_head, "UINT32"),
        Key(f"{ARCH}.attention.head_count_kv", hp.n_head_kv, "UINT32"),
        Key(f"{ARCH}.attention.key_length", hp.head_dim, "UINT32"),
        Key(f"{ARCH}.attention.value_length", hp.head_dim, "UINT32"),
        Key(f"{ARCH}.attention.layer_norm_rms_epsilon", hp.rms_eps, "FLOAT32"),
        Key(f"{ARCH}.rope.dimension_count", hp.head_dim, "UINT32"),
        Key(f"{ARCH}.rope.freq_base", hp.rope_base, "FLOAT32"),
        Key(f"{ARCH}.rope.scaling.type", "none", "STRING"),
        Key(f"{ARCH}.rope.scaling.original_context_length", hp.n_ctx_train, "UINT32"),
        Key(f"{ARCH}.expert_count", hp.n_expert, "UINT32"),
        Key(f"{ARCH}.expert_used_count", hp.n_expert_used, "UINT32"),
        Key(f"{ARCH}.expert_shared_count", hp.n_shared, "UINT32"),
        Key(f"{ARCH}.expert_feed_forward_length", hp.n_ff_exp, "UINT32"),
        Key(f"{ARCH}.expert_shared_feed_forward_length", hp.n_ff_shexp, "UINT32"),
        Key(f"{ARCH}.expert_weights_norm", True, "BOOL"),
        Key(f"{ARCH}.vocab_size", hp.n_vocab, "UINT32"),
    )


def load(config: Config, generation: Config) -> Architecture:
    """Read a Hunyuan-A13B config. Raises CheckpointError or UnsupportedError naming the key."""
    hp = read_hparams(config)
    return Architecture(
        name=ARCH,
        n_layer=hp.n_layer,
        n_expert=hp.n_expert,
        n_vocab=hp.n_vocab,
        n_extra=N_EXTRA,
        sizes={
            "n_vocab": hp.n_vocab,
            "n_embd": hp.n_embd,
            "n_embd_q": hp.n_head * hp.head_dim,
            "n_embd_kv": hp.n_head_kv * hp.head_dim,
            "head_dim": hp.head_dim,
            "n_expert": hp.n_expert,
            "n_ff_exp": hp.n_ff_exp,
            "n_ff_shexp": hp.n_ff_shexp,
        },
        rows=names(hp),
        metadata=metadata(hp),
        end_tokens=family.end_tokens((config, "eos_token_id"), (generation, "eos_token_id"), (config, "eod_token_id")),
        begin_token=BEGIN_TOKEN,
    )
