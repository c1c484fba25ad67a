"""Where a recipe's weights come from: one small protocol, and the GGUF that answers it.

A checkpoint folder answers it too, through hymoe.convert.weights_of; this room knows no checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from hymoe.errors import ModelFileError
from hymoe.gguf_head import ARRAY, MAX_KEY_BYTES, SCALARS, STRING, Cursor, Scalar, cursor
from hymoe.sizes import ALIGNMENT, padded, row_bytes, tensor_bytes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

PART_NAME = re.compile(r"(?P<stem>.+)-00001-of-(?P<count>\d{5})\.gguf")
# Types that hold the weights closely enough for errors of other types to be measured against them.
SOURCES = ("F32", "F16", "BF16", "Q8_0")
ROUTER = ".ffn_gate_inp."
EXPERTS = re.compile(r"blk\.(\d+)\..+_exps\.")


class Tensor(NamedTuple):
    """A tensor as a model has it: row-major `shape`, and its type."""

    shape: tuple[int, ...]
    qtype: GGMLQuantizationType

    @property
    def n_slice(self) -> int:
        """Matrices that it stacks: experts, or one."""
        return self.shape[0] if len(self.shape) > 2 else 1

    @property
    def n_rows(self) -> int:
        """Rows of one slice."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def n_weights(self) -> int:
        """Elements."""
        return prod(self.shape)


class Weights(Protocol):
    """The weights of a model.

    tensors: by GGUF name in the file's order. hparams: the architecture's whole numbers by GGUF's keys without its
    name. identity: tells these weights from any other. head_bytes: of a GGUF before its data. gguf: the file, where the
    engine can run it. has_values: whether `rows` answers; a checkpoint may be there without its shards.
    """

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...  # noqa: D102 - see above, as are the others

    @property
    def hparams(self) -> Mapping[str, int]: ...  # noqa: D102

    @property
    def identity(self) -> str: ...  # noqa: D102

    @property
    def head_bytes(self) -> int: ...  # noqa: D102

    @property
    def gguf(self) -> Path | None: ...  # noqa: D102

    @property
    def has_values(self) -> bool: ...  # noqa: D102

    def rows(self, name: str, index: int, rows: range) -> Floats:
        """Give rows of slice `index` of a tensor, [len(rows), n_per_row]."""


class GgufWeights:
    """A GGUF (or the first part of a split one) as Weights: read with pread, a few rows at a time."""

    def __init__(self, path: Path) -> None:
        self.gguf: Path | None = path
        self.has_values = True
        self.head_bytes = 0
        self._place: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        self._stack = ExitStack()
        self.tensors: dict[str, Tensor] = {}
        digest = hashlib.sha256()
        keys: dict[str, Scalar] = {}
        for part in parts_of(path):
            with cursor(part) as at:
                found = read_part(at)
            self._open(part, found, digest)
            keys = keys or found.keys
        self.identity = digest.hexdigest()
        self.keys = keys
        self.hparams = hparams_of(str(keys.get("general.architecture", "")), keys)

    @property
    def chat_template(self) -> str | None:
        """Give the chat template's text, None where there is none."""
        return str(self.keys["tokenizer.chat_template"]) if "tokenizer.chat_template" in self.keys else None

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(*tensor) for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, all tensors counted."""
        return 8 * self.n_bytes / sum(tensor.n_weights for tensor in self.tensors.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def _open(self, path: Path, found: Part, digest: hashlib._Hash) -> None:
        number = os.open(path, os.O_RDONLY)
        self._stack.callback(os.close, number)
        stat = os.fstat(number)
        if found.end > stat.st_size:
            raise ModelFileError(f"{path}: truncated", got=f"{stat.st_size} bytes", expected=found.end)
        digest.update(f"{stat.st_size} {stat.st_mtime_ns} {sorted(found.offsets.items())}".encode())
        self._files.append(number)
        self.tensors |= found.tensors
        self.head_bytes += found.begin
        self._place |= {name: (number, offset) for name, offset in found.offsets.items()}

    def place(self, name: str) -> tuple[int, int]:
        """Give the open file that holds a tensor, and where its bytes begin there."""
        return self._place[name]

    def stored(self, name: str, index: int, rows: range) -> Bytes:
        """Give the bytes of rows of a slice as the file has them, [len(rows), row_bytes]."""
        tensor = self.tensors[name]
        width = row_bytes(tensor.shape[-1], tensor.qtype)
        file, offset = self.place(name)
        start = offset + width * (index * tensor.n_rows + rows.start)
        raw = os.pread(file, width * len(rows), start)
        if len(raw) < width * len(rows):
            raise ModelFileError(f"{self.gguf}: truncated in {name}")
        return np.frombuffer(raw, np.uint8).reshape(len(rows), width)

    def rows(self, name: str, index: int, rows: range) -> Floats:
        """Give rows of slice `index` of a tensor, [len(rows), n_per_row]. Raises ModelFileError for no numbers."""
        from hymoe.engine.bindings import dequantize_rows

        raw, tensor = self.stored(name, index, rows), self.tensors[name]
        values = raw.view(np.float32) if tensor.qtype.name == "F32" else dequantize_rows(
            raw, tensor.qtype, tensor.shape[-1]
        )  # fmt: skip
        if not np.isfinite(values).all():
            raise ModelFileError(
                f"{self.gguf}: {name}", got="a weight that is no finite number", fix="download or convert it again"
            )
        return values


def matrices(weights: Weights) -> list[str]:
    """Name the tensors that may have another type: norms and routers keep F32, as every llama.cpp tool has it."""
    return [name for name, tensor in weights.tensors.items() if len(tensor.shape) > 1 and ROUTER not in name]


def layer_of_experts(name: str) -> int | None:
    """Give the layer of a stack of routed experts, None for other tensors."""
    found = EXPERTS.match(name)
    return int(found[1]) if found else None


def parts_of(path: Path) -> Iterator[Path]:
    """Give the file, or all parts of a split model by its first."""
    found = PART_NAME.fullmatch(path.name)
    count = int(found["count"]) if found else 1
    yield path
    for number in range(2, count + 1):
        assert found is not None
        yield path.with_name(f"{found['stem']}-{number:05d}-of-{count:05d}.gguf")


def hparams_of(architecture: str, keys: Mapping[str, object]) -> dict[str, int]:
    """Give the architecture's whole numbers by their key without its name."""
    prefix = f"{architecture}."
    return {
        key.removeprefix(prefix): value
        for key, value in keys.items()
        if key.startswith(prefix) and isinstance(value, int)
    }


class Part(NamedTuple):
    """A file's head: keys whose value is no array, tensors, their offsets in the file, begin and end of its data."""

    keys: dict[str, Scalar]
    tensors: dict[str, Tensor]
    offsets: dict[str, int]
    begin: int
    end: int


def read_part(at: Cursor) -> Part:
    """Read the head of one file of a model. Raises ModelFileError for what is damaged."""
    n_tensors, n_kv = at.begin()
    keys = dict(_scalars(at, n_kv))
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, int] = {}
    for index in range(n_tensors):
        at.where = f"tensor {index + 1} of {n_tensors}"
        name, n_dims = at.string(MAX_KEY_BYTES), at.u32()
        if not 1 <= n_dims <= 4:
            raise at.malformed(f"{n_dims} dimensions", "from 1 to 4")
        shape = tuple(reversed([at.u64() for _ in range(n_dims)]))
        kind, offsets[name] = at.u32(), at.u64()
        try:
            tensors[name] = Tensor(shape, GGMLQuantizationType(kind))
            tensor_bytes(*tensors[name])
        except ValueError as exc:
            raise at.malformed(str(exc), "a tensor of a known type") from exc
    alignment = keys.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise at.malformed(f"the alignment {alignment}", "a positive number")
    begin = padded(at.at, alignment)
    offsets = {name: begin + offset for name, offset in offsets.items()}
    end = max((offsets[name] + tensor_bytes(*tensor) for name, tensor in tensors.items()), default=begin)
    return Part(keys, tensors, offsets, begin, end)


def _scalars(at: Cursor, n_kv: int) -> Iterator[tuple[str, Scalar]]:
    for key, kind in at.keys(n_kv):
        if kind != ARRAY:
            yield key, at.single(kind)
            continue
        element, count = at.array()
        if element == STRING:
            at.skip_strings(count)
        else:
            at.at += count * SCALARS[element].size


def n_processors() -> int:
    """Give the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
