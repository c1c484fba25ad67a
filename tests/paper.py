"""Files that say they are whole models and hold no weights: a real head, and a data section that is a hole.

Nothing of a hole takes room on the disk, so a model of 80 billion parameters can be measured anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from tiny_model import byte_letters

from hymoe.sizes import padded, tensor_bytes


@dataclass(frozen=True)
class Paper:
    """A model's sizes. share: layers that use one layer's keys and values (Hunyuan-Large); 1: each its own."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_expert: int
    n_expert_used: int
    n_vocab: int
    share: int = 1
    small: Type = Type.Q4_K  # what most matrices are
    large: Type = Type.Q6_K  # and those that a mixture gives more bits

    def layers(self, n_layer: int) -> Paper:
        """The same model with fewer layers."""
        return replace(self, n_layer=n_layer)


A13B = Paper("hunyuan-moe", 32, 4096, 32, 8, 128, 3072, 64, 8, 128167)
# An expert's down matrix has rows of 18304, no multiple of 256: K-quants cannot take it.
LARGE = Paper("hunyuan-large", 64, 6400, 80, 8, 80, 18304, 16, 1, 129024, share=2, large=Type.Q8_0)


def write(path: Path, model: Paper) -> Path:
    """Write the head and leave a hole for the weights."""
    writer = GGUFWriter(path, model.architecture)
    _metadata(writer, model)
    total = 0
    for name, kind, shape in tensors(model):
        n_bytes = tensor_bytes(shape, kind)
        writer.add_tensor_info(name, shape, _plain(), n_bytes, raw_dtype=kind)
        total += padded(n_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(padded(file.seek(0, 2)) + total)
    return path


def tensors(model: Paper) -> Iterator[tuple[str, Type, tuple[int, ...]]]:
    """Give name, type and row-major shape, with the better type where Q4_K_M has it, in half of the layers."""
    q, kv, d, f = model.n_head * model.head_dim, model.n_head_kv * model.head_dim, model.n_embd, model.n_ff
    yield "token_embd.weight", model.large, (model.n_vocab, d)
    yield "output_norm.weight", Type.F32, (d,)
    rows_fit = f % 256 == 0
    for layer in range(model.n_layer):
        better = model.large if layer % 2 == 0 or not rows_fit else model.small
        shapes: dict[str, tuple[Type, tuple[int, ...]]] = {
            **dict.fromkeys(("attn_norm", "ffn_norm"), (Type.F32, (d,))),
            **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (Type.F32, (model.head_dim,))),
            "attn_q": (model.small, (q, d)),
            "attn_output": (model.small, (d, q)),
            "ffn_gate_inp": (Type.F32, (model.n_expert, d)),
            **{f"ffn_{part}_shexp": (model.small, (f, d)) for part in ("gate", "up")},
            "ffn_down_shexp": (better, (d, f)),
            **{f"ffn_{part}_exps": (model.small, (model.n_expert, f, d)) for part in ("gate", "up")},
            "ffn_down_exps": (better, (model.n_expert, d, f)),
        }
        if layer % model.share == 0:
            shapes |= {"attn_k": (model.small, (kv, d)), "attn_v": (better if rows_fit else model.small, (kv, d))}
        for name, (kind, shape) in shapes.items():
            yield f"blk.{layer}.{name}.weight", kind, shape


def _plain() -> object:
    import numpy as np

    return np.dtype(np.float32)


def _metadata(writer: GGUFWriter, model: Paper) -> None:
    writer.add_context_length(262144)
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(11158839.92507748)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_expert_count(model.n_expert)
    writer.add_expert_used_count(model.n_expert_used)
    writer.add_expert_feed_forward_length(model.n_ff)
    writer.add_expert_shared_feed_forward_length(model.n_ff)
    if model.share > 1:
        writer.add_uint32(f"{model.architecture}.attention.shared_kv_factor", model.share)
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_norm(False)
    letters = byte_letters()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("hunyuan")
    writer.add_token_list([*letters, *(f"t{i}" for i in range(model.n_vocab - len(letters)))])
    writer.add_token_types([TokenType.NORMAL] * model.n_vocab)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
