"""Which tensors go to which file: one GGUF, or a set of parts that llama.cpp loads by the name of the first.

A part is named NAME-00001-of-0000N.gguf and counts itself in split.no, split.count and split.tensors.count; all other
metadata is in the first. No tensor is ever cut.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState

from hymoe import sizes
from hymoe.convert.architectures import Key
from hymoe.convert.plan import Plan, PlannedTensor
from hymoe.errors import OutputError

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 65535  # split.count is 16 bits wide


@dataclass(frozen=True)
class Part:
    """One file of the output: where it will be, its bytes up to the data section, and its tensors."""

    path: Path
    head: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + sizes.data_bytes((tensor.shape, tensor.qtype) for tensor in self.tensors)

    @property
    def temporary(self) -> Path:
        """Its name until the output is complete."""
        return self.path.with_name(self.path.name + ".part")


def part_name(out: Path, index: int, count: int) -> Path:
    """Name part `index` (from 0) of `count`, as llama.cpp looks for it."""
    return out.with_name(f"{out.stem}-{index + 1:05d}-of-{count:05d}.gguf")


def lay_out(out: Path, plan: Plan, arch: str, keys: Iterable[Key], max_bytes: int | None = None) -> tuple[Part, ...]:
    """Divide the plan's tensors among files of at most `max_bytes`, in order; one plain file where they all fit.

    A tensor that is larger by itself has a part of its own. Raises OutputError where there would be too many parts.
    """
    keys = tuple(keys)
    whole = Part(out, _head(arch, keys, plan.tensors), plan.tensors)
    if max_bytes is None or whole.n_bytes <= max_bytes:
        return (whole,)
    # The counts take the same room whatever they are.
    first, other = (len(_head(arch, (*some, *_counts(0, 0, 0)), ())) for some in (keys, ()))
    groups = list(_groups(plan.tensors, max_bytes, first, other))
    if len(groups) > MAX_PARTS:
        raise OutputError(f"parts of {max_bytes} bytes", got=f"{len(groups)} of them", expected=f"at most {MAX_PARTS}")
    n_tensors = len(plan.tensors)
    return tuple(
        Part(
            part_name(out, index, len(groups)),
            _head(arch, (*(keys if index == 0 else ()), *_counts(index, len(groups), n_tensors)), group),
            group,
        )
        for index, group in enumerate(groups)
    )


def _groups(
    tensors: tuple[PlannedTensor, ...], max_bytes: int, first_head: int, other_head: int
) -> Iterator[tuple[PlannedTensor, ...]]:
    """Fill one part after the other; heads are the bytes of metadata without the tensor table."""
    group: list[PlannedTensor] = []
    head, data = first_head, 0
    for tensor in tensors:
        n_entry, n_data = _entry_bytes(tensor), sizes.padded(tensor.n_bytes)
        if group and sizes.padded(head + n_entry) + data + n_data > max_bytes:
            yield tuple(group)
            group, head, data = [], other_head, 0
        group.append(tensor)
        head += n_entry
        data += n_data
    yield tuple(group)


def _entry_bytes(tensor: PlannedTensor) -> int:
    """Bytes in the tensor table: name with its length, number of dimensions, dimensions, type, offset."""
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8


def _counts(index: int, count: int, n_tensors: int) -> tuple[Key, ...]:
    return (
        Key("split.no", index, "UINT16"),
        Key("split.count", count, "UINT16"),
        Key("split.tensors.count", n_tensors, "INT32"),
    )


def _head(arch: str, keys: Iterable[Key], tensors: Iterable[PlannedTensor]) -> bytes:
    """Give header, metadata and tensor table, padded to where the data start."""
    stream = io.BytesIO()
    writer = GGUFWriter(None, arch)
    for key in keys:
        writer.add_key_value(key.key, key.value, GGUFValueType[key.kind])
    for tensor in tensors:
        # The numpy dtype is only consulted where raw_dtype is absent.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.qtype)
    writer.fout, writer.state = [stream], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    head = stream.getvalue()
    return head.ljust(sizes.padded(len(head)), b"\0")
