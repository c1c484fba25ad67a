"""What a model's tensors weigh and where they may lie: everything about a file that a placement depends on.

It comes from a GGUF's head alone (`read`), or from any table of names, shapes and types (`of`): no weight is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Final, NamedTuple

from hymoe import sizes
from hymoe.errors import ModelFileError
from hymoe.gguf_head import Scalar
from hymoe.runtime import header

# Cache types a plan may choose or be asked for, the most exact first. Those of less than 16 bits come in blocks of 32
# elements, and the engine wants a head to be a whole number of them.
KV_TYPES: Final = ("f16", "q8_0", "q4_0")
KV_BLOCK: Final = 32
# What llama.cpp takes in place of a type whose blocks of 256 do not divide a row; IQ4_NL for all others.
SMALL_BLOCKS: Final = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}


class Role(StrEnum):
    """What a tensor is for, and with that who reads how much of it."""

    EMBEDDING = "embedding"  # one row for each token, always in RAM
    OUTPUT = "output"
    ATTENTION = "attention"
    SHARED = "shared expert"
    ROUTER = "router"
    NORM = "norms"
    EXPERTS = "experts"  # n_expert_used of n_expert for each token


# The first that matches a tensor's name. What is unknown is read for every token, as attention is.
_ROLES: Final = (
    (re.compile(r"^token_embd\."), Role.EMBEDDING),
    (re.compile(r"^output\."), Role.OUTPUT),
    (re.compile(r"\.ffn_\w+_exps\."), Role.EXPERTS),
    (re.compile(r"\.ffn_\w+_shexp\."), Role.SHARED),
    (re.compile(r"\.ffn_gate_inp\."), Role.ROUTER),
    (re.compile(r"_norm\."), Role.NORM),
)
_LAYER: Final = re.compile(r"^blk\.(\d+)\.")

# Metadata key without the architecture's prefix -> field of Shape. Those without a default must be there.
_REQUIRED: Final = {
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "attention.head_count": "n_head",
    "expert_count": "n_expert",
    "expert_used_count": "n_expert_used",
}
_OPTIONAL: Final = {
    "attention.head_count_kv": "n_head_kv",
    "attention.key_length": "head_dim",
    "attention.shared_kv_factor": "shared_kv_factor",
    "context_length": "n_ctx_train",
}


class Entry(NamedTuple):
    """A tensor of a table: row-major shape, and ggml's name of its type, such as "Q4_K"."""

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class Shape:
    """The model's sizes. Of every `shared_kv_factor` layers the first has keys and values, which the others use too."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_expert: int
    n_expert_used: int
    n_vocab: int
    n_ctx_train: int = 0  # tokens; 0 where the file does not say
    shared_kv_factor: int = 1


@dataclass(frozen=True)
class Tensor:
    """A tensor with its bytes; `layer` is None for those outside."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    role: Role
    layer: int | None

    @property
    def n_params(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """One layer's bytes and weights: what every token reads (`dense`, of it `attention`), and its stacked experts."""

    dense: int
    experts: int
    attention: int
    dense_params: int
    expert_params: int
    attention_params: int
    owns_kv: bool
    largest: int  # bytes of the largest stack of experts
    is_last: bool  # past its attention only rows go on whose logits are asked for


@dataclass(frozen=True)
class Layout:
    """A model as placement sees it."""

    name: str
    architecture: str
    shape: Shape
    tensors: tuple[Tensor, ...]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Sum up each layer."""
        groups: list[list[Tensor]] = [[] for _ in range(self.shape.n_layer)]
        for tensor in self.tensors:
            if tensor.layer is not None:
                groups[tensor.layer].append(tensor)
        share, last = self.shape.shared_kv_factor, self.shape.n_layer - 1
        return tuple(_layer(group, index % share == 0, index == last) for index, group in enumerate(groups))

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def n_params(self) -> int:
        """Number of weights in the file."""
        return sum(tensor.n_params for tensor in self.tensors)

    @cached_property
    def embedding(self) -> int:
        """Bytes of the token embeddings."""
        return self._sum(Role.EMBEDDING)

    @cached_property
    def is_tied(self) -> bool:
        """Whether the embeddings are the output matrix too."""
        return not self._sum(Role.OUTPUT)

    @cached_property
    def output(self) -> int:
        """Bytes of the output matrix and the norm before it; tied embeddings count again."""
        norm = sum(t.n_bytes for t in self.tensors if t.layer is None and t.role is Role.NORM)
        return norm + (self._sum(Role.OUTPUT) or self.embedding)

    @property
    def n_embd_kv(self) -> int:
        """Elements of a token's keys in one layer; as many of values."""
        return self.shape.n_head_kv * self.shape.head_dim

    def kv_types(self) -> tuple[str, ...]:
        """Give the cache types that the engine accepts for this model, the most exact first."""
        return KV_TYPES if self.shape.head_dim % KV_BLOCK == 0 else KV_TYPES[:1]

    def kv_bytes(self, n_ctx: int, kv_type: str) -> int:
        """Bytes of one owning layer's cache for `n_ctx` tokens."""
        return sizes.kv_bytes(self.n_embd_kv, n_ctx, kv_type)

    @cached_property
    def n_ff_exp(self) -> int:
        """Width of an expert."""
        return max((t.shape[-1] for t in self.tensors if t.role is Role.EXPERTS and "_down_" in t.name), default=0)

    @property
    def n_kv_layers(self) -> int:
        """Number of layers with keys and values of their own."""
        return sum(layer.owns_kv for layer in self.layers)

    def share_of(self, type_name: str) -> float:
        """Give the share of the layers' weights that have a type."""
        layers = [tensor for tensor in self.tensors if tensor.layer is not None]
        return sum(t.n_params for t in layers if t.type == type_name) / sum(t.n_params for t in layers)

    def with_experts(self, type_name: str) -> Layout:
        """Give the same model with all experts in another type; of smaller blocks where rows need them."""
        return replace(
            self, tensors=tuple(_retyped(t, type_name) if t.role is Role.EXPERTS else t for t in self.tensors)
        )

    def _sum(self, role: Role) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors if tensor.role is role)


def read(path: Path) -> Layout:
    """Read a GGUF's layout, of all its parts. Raises ModelFileError for what `header.peek` does, and missing keys."""
    from gguf import GGMLQuantizationType

    first = header.peek(path)
    try:
        table = [Entry(info.name, info.shape, GGMLQuantizationType(info.kind).name) for info in header.tensors(first)]
        return of(path.name, first.architecture, first.scalars, table)
    except ValueError as exc:  # a type that ggml lacks, or rows that are no whole number of blocks
        raise ModelFileError(f"{path}: tensor table", got=exc, fix="download or convert it again") from exc


def of(name: str, architecture: str, scalars: Mapping[str, Scalar], table: Iterable[Entry]) -> Layout:
    """Make a layout of metadata and a table of tensors.

    Raises ModelFileError for a key that is missing or no number; ValueError for an unknown type, or a shape it cannot
    have.
    """
    tensors = tuple(_tensor(entry, _layer_of(entry.name)) for entry in table)
    by_name = {tensor.name: tensor for tensor in tensors}
    if "token_embd.weight" not in by_name:
        raise ModelFileError(f"{name}: tensors", got="no token_embd.weight", expected="a whole model")
    found = {field: _number(name, scalars, f"{architecture}.{key}", None) for key, field in _REQUIRED.items()}
    defaults = {
        "n_head_kv": found["n_head"],
        "head_dim": found["n_embd"] // found["n_head"],
        "shared_kv_factor": 1,
        "n_ctx_train": 0,
    }
    for key, field in _OPTIONAL.items():
        found[field] = _number(name, scalars, f"{architecture}.{key}", defaults[field])
    layers = {tensor.layer for tensor in tensors} - {None}
    if layers != set(range(found["n_layer"])):
        raise ModelFileError(f"{name}: layers", got=f"tensors of {len(layers)}", expected=f"{found['n_layer']}")
    return Layout(name, architecture, Shape(n_vocab=by_name["token_embd.weight"].shape[0], **found), tensors)


def _number(name: str, scalars: Mapping[str, Scalar], key: str, default: int | None) -> int:
    value = scalars.get(key, default)
    least = 0 if default == 0 else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        got = "nothing" if value is None else repr(value)
        raise ModelFileError(f"{name}: {key}", got=got, expected="a whole number", fix="download or convert it again")
    return value


def _layer_of(name: str) -> int | None:
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def _tensor(entry: Entry, layer: int | None) -> Tensor:
    from gguf import GGMLQuantizationType

    if entry.type not in GGMLQuantizationType.__members__:
        raise ValueError(f"{entry.name}: unknown type {entry.type}")
    n_bytes = sizes.tensor_bytes(entry.shape, GGMLQuantizationType[entry.type])
    role = next((role for pattern, role in _ROLES if pattern.search(entry.name)), Role.ATTENTION)
    return Tensor(*entry, n_bytes, role, layer)


def _retyped(tensor: Tensor, type_name: str) -> Tensor:
    for name in (type_name, SMALL_BLOCKS.get(type_name, "IQ4_NL")):
        try:
            return _tensor(Entry(tensor.name, tensor.shape, name), tensor.layer)
        except ValueError:
            continue
    return tensor


def _layer(tensors: list[Tensor], owns_kv: bool, is_last: bool) -> Layer:
    dense = [tensor for tensor in tensors if tensor.role is not Role.EXPERTS]
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERTS]
    attention = [tensor for tensor in tensors if tensor.role is Role.ATTENTION]
    return Layer(
        dense=sum(tensor.n_bytes for tensor in dense),
        experts=sum(tensor.n_bytes for tensor in experts),
        attention=sum(tensor.n_bytes for tensor in attention),
        dense_params=sum(tensor.n_params for tensor in dense),
        expert_params=sum(tensor.n_params for tensor in experts),
        attention_params=sum(tensor.n_params for tensor in attention),
        owns_kv=owns_kv,
        largest=max((tensor.n_bytes for tensor in experts), default=0),
        is_last=is_last,
    )
