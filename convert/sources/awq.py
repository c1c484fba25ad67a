"""AWQ: 4-bit integers in groups of input columns, in AutoAWQ's "gemm" layout, which AngelSlim writes too.

    qweight  I32 [n_in, n_out / 8]        eight outputs of one input column to a word
    qzeros   I32 [n_groups, n_out / 8]    their zero points as they are, packed alike
    scales   BF16, F16 or F32 [n_groups, n_out]

Bits [4i, 4i + 4) of word c hold output 8c + ORDER[i]. The activation-aware scaling itself is folded into the
neighbouring weights; nothing of it is to be undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hymoe.convert.checkpoint import Checkpoint, TensorRef
from hymoe.convert.config import Config
from hymoe.convert.sources import Bytes, Floats, Gathered, Source
from hymoe.convert.sources.grouped import (
    Grouped,
    Members,
    check_dtype,
    check_matrix,
    check_members,
    columns,
    gather_groups,
    read_group_size,
    refs_of,
)

PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# Keys that change what the integers mean, with the values implemented here.
IMPLEMENTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("bits", (4,)),
    ("w_bit", (4,)),
    ("version", ("gemm", "GEMM")),
)


@dataclass(frozen=True)
class Awq(Grouped):
    """A matrix."""

    @property
    def format(self) -> str:
        """AWQ and the width of its integers."""
        return f"AWQ-Int{self.bits}"

    def integers(self, checkpoint: Checkpoint, first: int, count: int) -> Bytes:
        """Give q of rows [first, first + count): [count, n_in]."""
        return _outputs(checkpoint, self.refs[0], first, count)

    def zeros(self, checkpoint: Checkpoint, first: int, count: int) -> Floats:
        """Give the zero points of rows [first, first + count): [n_groups, count]."""
        return _outputs(checkpoint, self.refs[1], first, count).T.astype(np.float32)


def _outputs(checkpoint: Checkpoint, ref: TensorRef, first: int, count: int) -> Bytes:
    """Unpack the outputs [first, first + count) of words [n, n_out / 8] to [count, n]."""
    word, last = first // PER_WORD, -(-(first + count) // PER_WORD)
    packed = columns(checkpoint, ref, word, last - word).reshape(ref.shape[0], last - word, 4)
    planes = np.ascontiguousarray(packed.transpose(1, 2, 0))  # byte b of a word holds its integers 2b and 2b + 1
    result = np.empty((last - word, PER_WORD, ref.shape[0]), np.uint8)
    result[:, ORDER[0::2]] = planes & 15
    result[:, ORDER[1::2]] = planes >> 4
    begin = first - word * PER_WORD
    return result.reshape(-1, ref.shape[0])[begin : begin + count]


def gather(tensors: Mapping[str, TensorRef], settings: Config) -> Gathered:
    """Group the members of every matrix. Raises UnsupportedError by key, CheckpointError by tensor."""
    for key, allowed in IMPLEMENTED:
        settings.expect(key, *allowed)
    bits = settings.integer("bits", "w_bit")
    group_size = read_group_size(settings, "group_size", "q_group_size")
    settings.flag("zero_point", default=True)  # the stored zero points say it all

    def build(name: str, members: Members) -> Source:
        qweight = members["qweight"]
        check_dtype(qweight, "I32")
        check_matrix(qweight)
        n_in, n_out = qweight.shape[0], qweight.shape[1] * PER_WORD
        size = check_members(members, n_in, n_out, PER_WORD, group_size)
        return Awq(name, (n_out, n_in), refs_of(members), bits, size)

    return gather_groups(tensors, build)
