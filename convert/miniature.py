"""A miniature Hunyuan-A13B with random weights, written in a second: `python -m hymoe.convert.miniature DIR`.

The architecture is the real one (shared expert, routed experts, normed queries and keys, NTK-alpha RoPE, tied
embeddings, the published special tokens); only the sizes and the vocabulary are small. Tests, benchmarks and the
demo convert it as they would the published checkpoint.

Tensor names and shapes are spelled out here and not imported from the converter, so that an error in one of the
two tables shows as a difference instead of cancelling out.

Symbols: n_embd hidden size, n_ff_exp width of one expert, n_vocab rows of the embedding. Shapes are row-major,
[out, in] for matrices.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from zlib import crc32

import typer

from hymoe import console
from hymoe.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import pre_tokenizers

DType = Literal["BF16", "F16", "F32"]
ConfigStyle = Literal["2025", "transformers5"]
VocabFile = Literal["hy.tiktoken", "hunyuan.tiktoken", "tokenizer.json"]

# tiktoken's pre-tokenization pattern of the HunYuan family: digits stand alone, words take one leading space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The special tokens follow the last rank in this order, in the published vocabulary too.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
)

ITEM_BYTES: dict[str, int] = {"F32": 4, "BF16": 2, "F16": 2}
CHUNK_ELEMENTS = 1 << 22

# Above this many parameters the weights are cut from one random block instead of drawn one by one, so that a
# checkpoint of many gigabytes is written at the speed of the disk. A prime length keeps rows from repeating in step.
FRESH_PARAMETERS = 1 << 26
BLOCK_ELEMENTS = 8_388_593


@dataclass(frozen=True)
class Spec:
    """What to write; the defaults make a checkpoint of 10 million parameters in a second.

    `n_ff` is config.json's intermediate_size; `n_ff_exp` the width of one expert (None: the same). The shared
    expert is `n_shared * n_ff` wide, as vLLM and llama.cpp read the config (in published ones n_ff_exp is n_ff).
    `n_rank` counts the vocabulary without special tokens; `vocab` takes a tiktoken file instead of training one.
    `alpha` None leaves RoPE unscaled. `max_shard_bytes` None writes one model.safetensors, otherwise shards of
    about that size and an index.
    """

    n_layer: int = 4
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_ff: int = 256
    n_ff_exp: int | None = None
    n_expert: int = 12
    n_expert_used: int = 3
    n_shared: int = 1
    alpha: float | None = 1000.0
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    n_rank: int = 1790
    vocab: Path | None = None
    vocab_file: VocabFile | None = None
    tied: bool = True
    dtype: DType = "BF16"
    router_dtype: DType = "F32"
    config_style: ConfigStyle = "2025"
    max_shard_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that no model has."""
        if not 1 <= self.n_expert_used <= self.n_expert:
            raise ValueError(f"n_expert_used {self.n_expert_used} does not fit n_expert {self.n_expert}")
        if self.n_head % self.n_head_kv or self.head_dim % 2:
            raise ValueError(f"n_head {self.n_head}, n_head_kv {self.n_head_kv}, head_dim {self.head_dim} do not fit")
        if self.vocab is None and self.n_rank < 256:
            raise ValueError(f"n_rank {self.n_rank} leaves no room for the 256 bytes")

    @property
    def ff_exp(self) -> int:
        """Width of one routed expert."""
        return self.n_ff if self.n_ff_exp is None else self.n_ff_exp

    @property
    def vocabulary_name(self) -> VocabFile:
        """File the vocabulary goes to."""
        return self.vocab_file or ("tokenizer.json" if self.config_style == "transformers5" else "hy.tiktoken")


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint: values are drawn from N(mean, std²)."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    std: float
    mean: float = 0.0

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def write(folder: Path, spec: Spec | None = None, *, overwrite: bool = False) -> Path:
    """Write a complete checkpoint into `folder` and give the folder back.

    The files appear together: they are written beside the folder and moved when all are there. Memory stays
    below about 250 MB whatever the size. Raises OutputError where the folder holds files and `overwrite` is not
    set; with it, only files of the names written here are replaced.
    """
    spec = spec or Spec()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise OutputError(f"{folder} is not empty", fix="choose another folder or pass --overwrite")
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        _write_files(part, spec)
        _move_into(part, folder)
    except OSError as exc:
        raise OutputError(f"cannot write {folder}", got=exc.strerror or exc) from exc
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def vocabulary(spec: Spec) -> list[bytes]:
    """Give the token bytes by rank, special tokens excluded."""
    return read_tiktoken(spec.vocab) if spec.vocab else list(_trained(spec.n_rank))


def read_tiktoken(path: Path) -> list[bytes]:
    """Read a tiktoken file (one `base64 rank` per line). Raises CheckpointError where the ranks have gaps."""
    pairs = [line.split() for line in path.read_bytes().splitlines() if line]
    by_rank = {int(rank): base64.b64decode(token) for token, rank in pairs}
    if sorted(by_rank) != list(range(len(pairs))):
        raise CheckpointError(f"{path}: ranks are not 0, 1, 2, …", got=f"{len(pairs)} lines, {len(by_rank)} ranks")
    return [by_rank[rank] for rank in range(len(by_rank))]


def tensors(spec: Spec, n_vocab: int) -> list[Tensor]:
    """Give every tensor of the checkpoint: names and shapes as published, scales that keep the model lively.

    Matrices have std 1/sqrt(inputs), so that activations stay near 1 through the layers; the embedding is scaled
    for tied logits with a spread of about 3; the router for probabilities that differ by token.
    """
    embedding = 3 / sqrt(spec.n_embd)
    found = [
        Tensor("model.embed_tokens.weight", (n_vocab, spec.n_embd), spec.dtype, embedding),
        Tensor("model.norm.weight", (spec.n_embd,), spec.dtype, 0.1, 1.0),
    ]
    if not spec.tied:
        found.append(Tensor("lm_head.weight", (n_vocab, spec.n_embd), spec.dtype, embedding))
    for layer in range(spec.n_layer):
        found += _layer(spec, f"model.layers.{layer}")
    return found


def _layer(spec: Spec, prefix: str) -> Iterator[Tensor]:
    d, q, kv = spec.n_embd, spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    matrices = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
    }
    widths = {f"experts.{expert}": spec.ff_exp for expert in range(spec.n_expert)}
    for name, ff in {"shared_mlp": spec.n_ff * spec.n_shared, **widths}.items():
        matrices |= {f"mlp.{name}.gate_proj": (ff, d), f"mlp.{name}.up_proj": (ff, d), f"mlp.{name}.down_proj": (d, ff)}
    norms = {
        "input_layernorm": d,
        "post_attention_layernorm": d,
        "self_attn.query_layernorm": spec.head_dim,
        "self_attn.key_layernorm": spec.head_dim,
    }
    for name, width in norms.items():
        yield Tensor(f"{prefix}.{name}.weight", (width,), spec.dtype, 0.2, 1.0)
    for name, shape in matrices.items():
        yield Tensor(f"{prefix}.{name}.weight", shape, spec.dtype, 1 / sqrt(shape[1]))
    yield Tensor(f"{prefix}.mlp.gate.wg.weight", (spec.n_expert, d), spec.router_dtype, 1.5 / sqrt(d))


def _write_files(folder: Path, spec: Spec) -> None:
    n_vocab = write_descriptions(folder, spec)
    _write_weights(folder, spec, tensors(spec, n_vocab))


def write_descriptions(folder: Path, spec: Spec) -> int:
    """Write everything but the weights: configs, chat template, vocabulary. Give the number of tokens."""
    ranks = vocabulary(spec)
    ids = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    n_vocab = len(ranks) + len(ids)
    _write_json(folder / "config.json", _STYLES[spec.config_style](spec, n_vocab, ids))
    _write_json(folder / "generation_config.json", _generation_config(ids))
    _write_tokenizer_config(folder, spec)
    if spec.vocabulary_name == "tokenizer.json":
        _write_tokenizer_json(folder / "tokenizer.json", ranks)
    else:
        write_tiktoken(folder / spec.vocabulary_name, ranks)
    return n_vocab


def write_tiktoken(path: Path, ranks: Sequence[bytes]) -> None:
    """Write a tiktoken file, one `base64 rank` per line."""
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))


def _move_into(part: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ours = ("config.json", "generation_config.json", "tokenizer*.json", "chat_template.jinja", "*.tiktoken", "model*")
    for pattern in ours:
        for old in folder.glob(pattern):
            old.unlink()
    for file in part.iterdir():
        file.replace(folder / file.name)


# -- vocabulary ------------------------------------------------------------------------------------------------------


@cache
def _trained(n_rank: int) -> tuple[bytes, ...]:
    """Train on the calibration texts."""
    from hymoe.imatrix import calibration

    return trained([text.content for text in calibration.texts()], n_rank)


def trained(texts: Sequence[str], n_rank: int, *, max_bytes: int | None = None) -> tuple[bytes, ...]:
    """Train a byte-level BPE on `texts`: the 256 bytes first, then the merges in order.

    `max_bytes` bounds a token's length, so that no phrase that the texts repeat becomes one. Raises ValueError where
    the texts give fewer than `n_rank` tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_rank, initial_alphabet=alphabet, show_progress=False, max_token_length=max_bytes
    )
    tokenizer.train_from_iterator(texts, trainer)
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if len(by_id) != n_rank:
        raise ValueError(f"the texts give {len(by_id)} tokens, n_rank asks for {n_rank}")
    return tuple(bytes(letters[letter] for letter in token) for token, _ in by_id)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    pieces = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@cache
def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte: the letter itself where it prints, else the next from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(rest)}


def _write_tokenizer_json(path: Path, ranks: Sequence[bytes]) -> None:
    """Write the form in which newer transformers saves the vocabulary: every two-part split of a token is a merge."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    merges = []
    for token in ranks:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in rank_of and b in rank_of]
        known.sort(key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
        merges += [(spelled[a], spelled[b]) for a, b in known]
    vocab = {spelled[token]: rank for token, rank in rank_of.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path))


# -- json files ------------------------------------------------------------------------------------------------------


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_2025(spec: Spec, n_vocab: int, ids: dict[str, int]) -> dict[str, Any]:
    """config.json with the keys of the first release, quirks included: bos_token_id 1, per-layer lists."""
    return {
        "add_classification_head": False,
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_head_dim": spec.head_dim,
        "auto_map": {
            "AutoConfig": "configuration_hunyuan.HunYuanConfig",
            "AutoModel": "hunyuan.HunYuanModel",
            "AutoModelForCausalLM": "hunyuan.HunYuanMoEV1ForCausalLM",
        },
        "bos_token_id": 1,
        "cla_share_factor": 2,
        "class_num": 0,
        "dense_list": [spec.n_embd, 0],
        "eod_token_id": ids["<|extra_5|>"],
        "eos_token_id": ids["<|eos|>"],
        "group_limited_greedy": False,
        "hidden_act": "silu",
        "hidden_size": spec.n_embd,
        "initializer_range": 0.02,
        "intermediate_size": spec.n_ff,
        "kv_lora_rank": None,
        "max_position_embeddings": 32768,
        "mlp_bias": False,
        "model_type": "hunyuan",
        "moe_drop_tokens": False,
        "moe_intermediate_size": [spec.ff_exp] * spec.n_layer,
        "moe_layer_num_skipped": 0,
        "moe_random_routing_dropped_token": False,
        "moe_topk": [spec.n_expert_used] * spec.n_layer,
        "n_group": None,
        "norm_topk_prob": True,
        "norm_type": "rms",
        "num_attention_heads": spec.n_head,
        "num_experts": spec.n_expert,
        "num_hidden_layers": spec.n_layer,
        "num_key_value_heads": spec.n_head_kv,
        "num_shared_expert": [spec.n_shared] * spec.n_layer,
        "org_vocab_size": n_vocab,
        "pad_id": ids["<|pad|>"],
        "pad_token_id": ids["<|pad|>"],
        "pool_type": "last",
        "position_embedding_xdrope": False,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": None,
        "qk_rope_head_dim": None,
        "rms_norm_eps": spec.rms_eps,
        "rope_scaling": _rope_scaling(spec),
        "rope_theta": spec.rope_theta,
        "routed_scaling_factor": 1.0,
        "sep_token_id": ids["<|extra_0|>"],
        "skip_cls_token": False,
        "tie_word_embeddings": spec.tied,
        "topk_group": None,
        "torch_dtype": _TORCH_DTYPES[spec.dtype],
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_cla": False,
        "use_mixed_mlp_moe": True,
        "use_mla": False,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
        "v_head_dim": None,
        "vocab_size": n_vocab,
        "xdrope_section": None,
    }


def _config_transformers5(spec: Spec, n_vocab: int, ids: dict[str, int]) -> dict[str, Any]:
    """config.json as transformers 5 saves it again: other names for the rope, the dtype and the head width."""
    config = _config_2025(spec, n_vocab, ids)
    rope = config.pop("rope_scaling") or {"type": "default"}
    rope_type = rope.pop("type")
    for gone in ("auto_map", "attention_head_dim", "torch_dtype", "rope_theta"):
        config.pop(gone)
    config |= {
        "dtype": _TORCH_DTYPES[spec.dtype],
        "head_dim": spec.head_dim,
        "model_type": "hunyuan_v1_moe",
        "rope_parameters": {**rope, "rope_theta": spec.rope_theta, "rope_type": rope_type},
        "transformers_version": "5.0.0",
    }
    return dict(sorted(config.items()))


_TORCH_DTYPES: dict[DType, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_STYLES: dict[ConfigStyle, Callable[[Spec, int, dict[str, int]], dict[str, Any]]] = {
    "2025": _config_2025,
    "transformers5": _config_transformers5,
}


def _rope_scaling(spec: Spec) -> dict[str, Any] | None:
    if spec.alpha is None:
        return None
    plain = {"beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {"alpha": spec.alpha, **plain, "type": "dynamic"}


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "eos_token_id": [ids["<|eos|>"], ids["<|extra_5|>"]],
        "pad_token_id": ids["<|pad|>"],
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "transformers_version": "4.31.0",
    }


def _write_tokenizer_config(folder: Path, spec: Spec) -> None:
    """Write tokenizer_config.json with our own chat template, which transformers 5 keeps in its own file."""
    from hymoe import chat_templates

    template = chat_templates.fallback()
    config: dict[str, Any] = {
        "model_max_length": 1048576,
        "tokenizer_class": "HYTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]},
        "eos_token": "<|eos|>",
        "model_type": "gpt2",
        "additional_special_tokens": ["<|startoftext|>", "<|extra_0|>", "<|extra_4|>", "<|extra_5|>", "<|eos|>"],
        "pad_token": "<|pad|>",
    }
    if spec.config_style == "transformers5":
        config.pop("auto_map")
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "chat_template.jinja").write_bytes(template.encode())
    else:
        config["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", config)


# -- weights ---------------------------------------------------------------------------------------------------------


def _write_weights(folder: Path, spec: Spec, all_tensors: Sequence[Tensor]) -> None:
    fresh = sum(prod(tensor.shape) for tensor in all_tensors) <= FRESH_PARAMETERS
    chunks = _fresh_chunks if fresh else _Block(spec.seed).chunks
    shards = _shards(all_tensors, spec.max_shard_bytes)
    if spec.max_shard_bytes is None:
        _write_safetensors(folder / "model.safetensors", shards[0], spec.seed, chunks)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard, spec.seed, chunks)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.n_bytes for tensor in all_tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(all_tensors: Sequence[Tensor], max_bytes: int | None) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in all_tensors:
        if max_bytes is not None and shards[-1] and size + tensor.n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    return shards


Chunks = Callable[[Tensor, int], "Iterator[NDArray[np.generic]]"]


def _write_safetensors(path: Path, shard: Sequence[Tensor], seed: int, chunks: Chunks) -> None:
    """Write one file: header first, then every tensor in pieces. https://github.com/huggingface/safetensors#format."""
    # Wide types first, then by name: what the library does, so that every offset is aligned.
    ordered = sorted(shard, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.n_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            for chunk in chunks(tensor, seed):
                file.write(chunk.data)


def _generator(seed: int, name: str) -> np.random.Generator:
    """Give the generator of one tensor: its values depend on seed and name, not on the order of writing."""
    import numpy as np

    return np.random.default_rng([seed, crc32(name.encode())])


def _fresh_chunks(tensor: Tensor, seed: int) -> Iterator[NDArray[np.generic]]:
    """Draw the tensor's values, a chunk at a time."""
    import numpy as np

    generator = _generator(seed, tensor.name)
    left = prod(tensor.shape)
    while left:
        n = min(left, CHUNK_ELEMENTS)
        values = generator.standard_normal(n, dtype=np.float32)
        yield _as_dtype(values * np.float32(tensor.std) + np.float32(tensor.mean), tensor.dtype)
        left -= n


class _Block:
    """One block of normal values, scaled once per (std, mean, dtype); a tensor reads it from an offset of its own."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._unit = _generator(seed, "block").standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
        self._scaled: dict[tuple[float, float, DType], NDArray[np.generic]] = {}

    def chunks(self, tensor: Tensor, seed: int) -> Iterator[NDArray[np.generic]]:
        import numpy as np

        key = (tensor.std, tensor.mean, tensor.dtype)
        if key not in self._scaled:
            self._scaled[key] = _as_dtype(self._unit * np.float32(tensor.std) + np.float32(tensor.mean), tensor.dtype)
        block = self._scaled[key]
        start = int(_generator(seed, tensor.name).integers(BLOCK_ELEMENTS))
        left = prod(tensor.shape)
        while left:
            piece = block[start : start + left]
            yield piece
            left -= piece.size
            start = 0


def _as_dtype(values: NDArray[np.float32], dtype: DType) -> NDArray[np.generic]:
    """Round float32 to the file's type; BF16 comes as its bits, to nearest even (numpy has no such type)."""
    import numpy as np

    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


# -- command ---------------------------------------------------------------------------------------------------------


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def miniature(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; created where it is missing.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
    dtype: Annotated[DType, typer.Option(help="Type of the weights.")] = "BF16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in DIR.")] = False,
) -> None:
    """Write a miniature Hunyuan-A13B checkpoint with random weights."""
    write(folder, Spec(seed=seed, dtype=dtype), overwrite=overwrite)
    console.result(str(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return console.run(app, argv, "python -m hymoe.convert.miniature")


if __name__ == "__main__":
    sys.exit(main())
