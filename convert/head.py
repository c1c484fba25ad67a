"""The head of a GGUF as raw bytes with their meaning: what a repair copies and what it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import unpack_from
from typing import Any

from gguf import GGMLQuantizationType, GGUFValueType

from hymoe import sizes
from hymoe.errors import ModelFileError
from hymoe.gguf_head import ARRAY, MAX_KEY_BYTES, SCALARS, STRING, Cursor, cursor, shown

MAX_DIMS = 4
# Far above any model's. What is built is some 100 bytes for each: a crafted file must not fill the memory.
MAX_ENTRIES, MAX_TENSORS, MAX_ELEMENTS = 1 << 16, 1 << 16, 4 << 20  # elements: of all arrays together
MAX_ALIGNMENT = 1 << 20


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
    with cursor(path) as at:
        head = _Reader(at).head()
        if head.data_end > at.size:
            raise ModelFileError(
                f"{path}: truncated", got=f"{at.size} bytes", expected=head.data_end, fix="download it again"
            )
    return head


class _Reader:
    """Builds what the cursor reads, within limits."""

    def __init__(self, cursor: Cursor) -> None:
        self.at = cursor
        self.n_elements = 0

    def head(self) -> Head:
        n_tensors, n_kv = self.at.begin()
        self._limit("metadata entries", n_kv, MAX_ENTRIES)
        self._limit("tensors", n_tensors, MAX_TENSORS)
        entries = self._entries(n_kv)
        alignment = self._alignment(entries)
        begin, ends, shapes = self.at.at, [0], {}
        for index in range(n_tensors):
            self.at.where = f"tensor {index + 1} of {n_tensors}"
            name, shape, end = self._tensor()
            shapes[name] = shape
            ends.append(end)
        table = self.at.data[begin : self.at.at]
        offset = sizes.padded(self.at.at, alignment)
        return Head(entries, shapes, table, alignment, offset, offset + max(ends))

    def _entries(self, n_kv: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        begin = self.at.at
        for key, kind in self.at.keys(n_kv):
            value = self._array() if kind == ARRAY else self.at.single(kind)
            entries[key] = Entry(GGUFValueType(kind), value, self.at.data[begin : self.at.at])
            begin = self.at.at
        return entries

    def _array(self) -> list[Any]:
        kind, count = self.at.array()
        self.n_elements += count
        self._limit("elements of arrays", self.n_elements, MAX_ELEMENTS)
        if kind == STRING:
            return [self.at.string() for _ in range(count)]
        begin = self.at.at
        self.at.at += count * SCALARS[kind].size
        return list(unpack_from(f"<{count}{SCALARS[kind].format[1:]}", self.at.data, begin))

    def _alignment(self, entries: Mapping[str, Entry]) -> int:
        given = entries.get("general.alignment")
        alignment = given.value if given else sizes.ALIGNMENT
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.at.where = "general.alignment"
            found = str(alignment) if isinstance(alignment, int | float) else "no number"
            raise self.at.malformed(found, f"a power of two up to {MAX_ALIGNMENT}")
        return alignment

    def _tensor(self) -> tuple[str, tuple[int, ...], int]:
        """Give name, row-major shape and the end of the data, counted from where data begin."""
        name, n_dims = self.at.string(MAX_KEY_BYTES), self.at.u32()
        self.at.where = f"tensor {shown(name)}"
        self._limit("dimensions", n_dims, MAX_DIMS, least=1)
        shape = tuple(reversed([self.at.u64() for _ in range(n_dims)]))
        kind, offset = self.at.u32(), self.at.u64()
        try:
            return name, shape, offset + sizes.tensor_bytes(shape, GGMLQuantizationType(kind))
        except ValueError as exc:  # no such type, or a row that is no whole number of its blocks
            raise self.at.malformed(str(exc), "a tensor of a known type") from exc

    def _limit(self, what: str, count: int, most: int, *, least: int = 0) -> None:
        if not least <= count <= most:
            raise self.at.malformed(f"{count} {what}", f"from {least} to {most}" if least else f"at most {most}")
