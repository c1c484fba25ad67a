"""The head of a GGUF as raw bytes with their meaning: what a repair copies and what it replaces.

Layout (little-endian): "GGUF", u32 version, u64 n_tensors, u64 n_kv; n_kv times (string key, u32 type, value);
n_tensors times (string name, u32 n_dims, u64 dims, u32 type, u64 offset); padding. gguf-py's reader gives the same, but
takes ten times as long over a vocabulary.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFValueType

from hymoe import sizes
from hymoe.errors import ModelFileError

VERSIONS = (2, 3)
MAX_DIMS = 4
SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class Entry:
    """One metadata entry: its type and value, and all its bytes with the key's."""

    kind: GGUFValueType
    value: Any
    raw: bytes


@dataclass(frozen=True)
class Head:
    """Metadata by key, row-major shapes by tensor, the tensor table's bytes, and where the data begin and end."""

    entries: Mapping[str, Entry]
    shapes: Mapping[str, tuple[int, ...]]
    table: bytes
    alignment: int
    data_offset: int
    data_end: int


def read_head(path: Path) -> Head:
    """Read the head. Raises ModelFileError for what is no file, no GGUF, or ends before its tensors do."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head = _Reader(data).head()
            size = len(data)
    except FileNotFoundError as exc:
        raise ModelFileError(f"{path}: no such file", expected="a GGUF file") from exc
    except OSError as exc:
        raise ModelFileError(f"{path}: cannot be read", got=exc.strerror or exc) from exc
    except (ValueError, struct.error) as exc:
        raise ModelFileError(f"{path}: no GGUF, or a damaged one", got=exc, fix="download or convert it again") from exc
    if head.data_end > size:
        raise ModelFileError(f"{path}: truncated", got=f"{size} bytes", expected=head.data_end, fix="download it again")
    return head


class _Reader:
    """A cursor over the mapped file. Whatever does not add up is a ValueError or struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def head(self) -> Head:
        if self._bytes(4) != b"GGUF":
            raise ValueError("other first bytes than GGUF")
        if (version := self._number("<I")) not in VERSIONS:
            raise ValueError(f"version {version}")
        n_tensors, n_kv = self._number("<Q"), self._number("<Q")
        entries = dict(self._entry() for _ in range(n_kv))
        begin, ends, shapes = self.at, [0], {}
        for _ in range(n_tensors):
            name, shape, end = self._tensor()
            shapes[name] = shape
            ends.append(end)
        table = self.data[begin : self.at]
        given = entries.get("general.alignment")
        alignment = given.value if given else sizes.ALIGNMENT
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        offset = sizes.padded(self.at, alignment)
        return Head(entries, shapes, table, alignment, offset, offset + max(ends))

    def _entry(self) -> tuple[str, Entry]:
        begin = self.at
        key = self._string()
        kind = GGUFValueType(self._number("<I"))
        value = self._value(kind)
        return key, Entry(kind, value, self.data[begin : self.at])

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._number(SCALARS[kind])
        inner, count = GGUFValueType(self._number("<I")), self._number("<Q")
        if inner == GGUFValueType.STRING:
            return [self._string() for _ in range(count)]
        if inner not in SCALARS:
            raise ValueError("an array of arrays")
        form = f"<{count}{SCALARS[inner][1]}"
        return list(struct.unpack(form, self._bytes(count * struct.calcsize(SCALARS[inner]))))

    def _tensor(self) -> tuple[str, tuple[int, ...], int]:
        """Give name, row-major shape and the end of the data, counted from where data begin."""
        name, n_dims = self._string(), self._number("<I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise ValueError(f"{name} has {n_dims} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(n_dims)]))
        qtype, offset = GGMLQuantizationType(self._number("<I")), self._number("<Q")
        return name, shape, offset + sizes.tensor_bytes(shape, qtype)

    def _string(self) -> str:
        return self._bytes(self._number("<Q")).decode("utf-8")

    def _number(self, form: str) -> Any:
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def _bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"ends {count - len(self.data) + self.at} bytes too early")
        self.at += count
        return self.data[self.at - count : self.at]
