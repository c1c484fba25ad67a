"""A tiny HunYuan model for the runtime's tests: greedy by its own metadata, and its text is plain letters.

Written with gguf-py and not with our converter, so that those tests say nothing about that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from numpy.typing import NDArray

SPECIAL = ["<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"] + [f"<|extra_{i}|>" for i in range(6)]
LETTERS = b"abcdefghijklmnopqrstuvwxyz "
N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM, N_FF, N_EXPERT, N_EXPERT_USED = 2, 64, 4, 2, 16, 64, 4, 2
TRAINED = 512  # tokens of context


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def write_model(
    path: Path,
    *,
    template: str | None = None,
    architecture: str = "hunyuan-moe",
    words: int = 0,
    trained: int | None = TRAINED,
    keys: Mapping[str, str | int | float] | None = None,
) -> Path:
    """Write a model with random weights whose only likely tokens are small letters; `words` adds unused tokens.

    keys: more metadata, as strings, uint32 and float32.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    if trained is not None:
        writer.add_context_length(trained)
    add_hparams(writer, N_LAYER, N_EMBD, N_FF, heads=(N_HEAD, N_HEAD_KV, HEAD_DIM), experts=(N_EXPERT, N_EXPERT_USED))
    writer.add_float32("general.sampling.temp", 0.0)
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    tokens = [*byte_letters(), *SPECIAL, *(f"word{i}" for i in range(words))]
    n_special = len(SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("hunyuan")
    writer.add_token_list(tokens)
    writer.add_token_types([*[TokenType.NORMAL] * 256, *[TokenType.CONTROL] * n_special, *[TokenType.NORMAL] * words])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokens.index("<|startoftext|>"))
    writer.add_eos_token_id(tokens.index("<|eos|>"))
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    for name, tensor in tensors(len(tokens)):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_hparams(
    writer: GGUFWriter, n_layer: int, n_embd: int, n_ff: int, *, heads: tuple[int, int, int], experts: tuple[int, int]
) -> None:
    """Write a graph's sizes. heads: n_head, n_head_kv, head_dim; experts: n_expert, n_expert_used; all n_ff wide."""
    n_head, n_head_kv, head_dim = heads
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(n_ff)
    writer.add_expert_count(experts[0])
    writer.add_expert_used_count(experts[1])
    writer.add_expert_feed_forward_length(n_ff)
    writer.add_expert_shared_feed_forward_length(n_ff)


def tensors(n_vocab: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    random = np.random.default_rng(7)

    def matrix(*shape: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        return values

    output = np.zeros((n_vocab, N_EMBD), np.float32)
    output[list(LETTERS)] = 4 * matrix(len(LETTERS), N_EMBD)
    yield "token_embd.weight", matrix(n_vocab, N_EMBD) * 8
    yield "output.weight", output
    yield "output_norm.weight", np.ones(N_EMBD, np.float32)
    q, kv = N_HEAD * HEAD_DIM, N_HEAD_KV * HEAD_DIM
    shapes = {
        **{"attn_q": (q, N_EMBD), "attn_k": (kv, N_EMBD), "attn_v": (kv, N_EMBD), "attn_output": (N_EMBD, q)},
        **{"ffn_gate_inp": (N_EXPERT, N_EMBD), "ffn_gate_shexp": (N_FF, N_EMBD), "ffn_up_shexp": (N_FF, N_EMBD)},
        **{"ffn_down_shexp": (N_EMBD, N_FF), "ffn_gate_exps": (N_EXPERT, N_FF, N_EMBD)},
        **{"ffn_up_exps": (N_EXPERT, N_FF, N_EMBD), "ffn_down_exps": (N_EXPERT, N_EMBD, N_FF)},
    }
    norms = {"attn_norm": N_EMBD, "ffn_norm": N_EMBD, "attn_q_norm": HEAD_DIM, "attn_k_norm": HEAD_DIM}
    for layer in range(N_LAYER):
        for name, shape in shapes.items():
            yield f"blk.{layer}.{name}.weight", matrix(*shape)
        for name, width in norms.items():
            yield f"blk.{layer}.{name}.weight", np.ones(width, np.float32)
