"""Files with the layers of Hunyuan-A13B, or narrower ones of its kind, and random weights in the types of Q4_K_M."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Shape:
    """A model's sizes; A13B's but for the number of layers."""

    n_layer: int
    n_embd: int = 4096
    n_head: int = 32
    n_head_kv: int = 8
    head_dim: int = 128
    n_ff: int = 3072
    n_expert: int = 64
    n_expert_used: int = 8
    n_vocab: int = 128167


def write(out: Path, shape: Shape) -> Path:
    """Write the file: the types of Q4_K_M, random numbers, the same in every layer; it appears whole."""
    import gguf

    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "hunyuan-moe")
    metadata(writer, shape)
    for name, kind, dims in tensors(shape):
        writer.add_tensor(name, weights(kind, *dims), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(out)
    return out


def metadata(writer: Any, shape: Shape) -> None:
    from gguf import TokenType

    writer.add_context_length(32768)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(11158839.92507748)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    writer.add_expert_feed_forward_length(shape.n_ff)
    writer.add_expert_shared_feed_forward_length(shape.n_ff)
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(code) for code in (*plain, *range(256, 256 + 256 - len(plain)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("hunyuan")
    writer.add_token_list([*letters, *(f"t{i}" for i in range(shape.n_vocab - len(letters)))])
    writer.add_token_types([TokenType.NORMAL] * shape.n_vocab)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def tensors(shape: Shape) -> Iterator[tuple[str, GGMLQuantizationType, tuple[int, ...]]]:
    """Give name, type and row-major dimensions; Q6_K where llama.cpp's Q4_K_M has it, in half of the layers."""
    from gguf import GGMLQuantizationType as Type

    d, f, n = shape.n_embd, shape.n_ff, shape.n_expert
    q, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    yield "token_embd.weight", Type.Q6_K, (shape.n_vocab, d)
    yield "output_norm.weight", Type.F32, (d,)
    for layer in range(shape.n_layer):
        better = Type.Q6_K if layer % 2 == 0 else Type.Q4_K
        for name, kind, dims in (
            *(("attn_norm", Type.F32, (d,)), ("ffn_norm", Type.F32, (d,))),
            *(("attn_q_norm", Type.F32, (shape.head_dim,)), ("attn_k_norm", Type.F32, (shape.head_dim,))),
            *(("attn_q", Type.Q4_K, (q, d)), ("attn_k", Type.Q4_K, (kv, d))),
            *(("attn_v", better, (kv, d)), ("attn_output", Type.Q4_K, (d, q))),
            ("ffn_gate_inp", Type.F32, (n, d)),
            *(("ffn_gate_shexp", Type.Q4_K, (f, d)), ("ffn_up_shexp", Type.Q4_K, (f, d))),
            ("ffn_down_shexp", better, (d, f)),
            *(("ffn_gate_exps", Type.Q4_K, (n, f, d)), ("ffn_up_exps", Type.Q4_K, (n, f, d))),
            ("ffn_down_exps", better, (n, d, f)),
        ):
            yield f"blk.{layer}.{name}.weight", kind, dims


def n_bytes(shape: Shape) -> int:
    """Give the bytes of a file's tensors."""
    from gguf import GGML_QUANT_SIZES

    sizes = ((prod(dims), *GGML_QUANT_SIZES[kind]) for _, kind, dims in tensors(shape))
    return sum(n // per_block * size for n, per_block, size in sizes)


_made: dict[tuple[Any, ...], Any] = {}


def weights(kind: GGMLQuantizationType, *shape: int) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Give values of a standard deviation of about 0.015, norms of 1; the same array for the same type and shape."""
    if (kind, shape) not in _made:
        _made[kind, shape] = make(kind, shape)
    found: NDArray[np.uint8] | NDArray[np.float32] = _made[kind, shape]
    return found


def make(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> NDArray[np.uint8] | NDArray[np.float32]:
    import numpy as np
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Type

    random = np.random.default_rng(len(_made))
    if kind == Type.F32:
        values = np.ones(shape) if len(shape) == 1 else 0.015 * random.standard_normal(shape)
        return values.astype(np.float32)
    per_block, size = GGML_QUANT_SIZES[kind]
    n_blocks = int(np.prod(shape)) // per_block
    blocks = np.frombuffer(random.bytes(n_blocks * size), np.uint8).reshape(n_blocks, size).copy()
    # Q4_K: value = d * scale * quant - dmin * minimum, d and dmin in front; Q6_K: d * scale * (quant - 32), d last
    if kind == Type.Q4_K:
        blocks[:, :4] = np.frombuffer(np.array([7.5e-5, 5.6e-4], np.float16).tobytes(), np.uint8)
    else:
        blocks[:, -2:] = np.frombuffer(np.array([1.1e-5], np.float16).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], shape[-1] // per_block * size)


def layers_that_fit() -> int:
    # MemAvailable counts the page cache, which gives way: the file's own pages may fill it from the run before
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return max(1, min(32, int(kib * 1024 / 2 / 1.45e9)))
