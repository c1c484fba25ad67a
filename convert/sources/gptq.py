"""GPTQ: 4- or 8-bit integers, in groups of input columns that act-order may have shuffled.

Layout, with n integers to a 32-bit word, the first in the lowest bits (AutoGPTQ's, which AngelSlim writes too):

    qweight  I32 [n_in / n, n_out]       integer j of word [r, o] is q[o, n·r + j]
    qzeros   I32 [n_groups, n_out / n]   integer j of word [g, c] is the zero point of output n·c + j, less one
    scales   BF16, F16 or F32 [n_groups, n_out]
    g_idx    I32 [n_in]                  group of every input column; where absent, i // group_size

A zero point is the stored integer plus one, unmasked: a stored 15 means 16, as in AngelSlim, vLLM and llama.cpp.
checkpoint_format "gptq_v2" stores the zero point itself. Symmetric checkpoints store theirs as well.
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
    OPTIONAL,
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
from hymoe.errors import CheckpointError

# Keys that change what the integers mean, with the values implemented here.
IMPLEMENTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("bits", (4, 8)),
    ("checkpoint_format", ("gptq", "gptq_v2")),
    ("format", ("gptq", "gptq_v2")),
    ("is_marlin_format", (False,)),
    ("pack_dtype", ("int32",)),
    ("dynamic", ({}, False)),  # other settings for some of the modules
    ("rotation", ("",)),
)


@dataclass(frozen=True)
class Gptq(Grouped):
    """A matrix; `zero_offset` is what its stored zero points lack."""

    zero_offset: int

    @property
    def format(self) -> str:
        """GPTQ and the width of its integers."""
        return f"GPTQ-Int{self.bits}"

    def integers(self, checkpoint: Checkpoint, first: int, count: int) -> Bytes:
        """Give q of rows [first, first + count): [count, n_in]."""
        words = columns(checkpoint, self.refs[0], first, count).view(np.uint32)
        return unpack(np.ascontiguousarray(words.T).view(np.uint8), self.bits)

    def zeros(self, checkpoint: Checkpoint, first: int, count: int) -> Floats:
        """Give the zero points of rows [first, first + count): [n_groups, count]."""
        per_word = 32 // self.bits
        word, last = first // per_word, -(-(first + count) // per_word)
        stored = unpack(columns(checkpoint, self.refs[1], word, last - word), self.bits)
        begin = first - word * per_word
        return stored[:, begin : begin + count].astype(np.float32) + np.float32(self.zero_offset)


def unpack(packed: Bytes, bits: int) -> Bytes:
    """One integer to a byte, from bytes that hold 8 / bits of them, the first in the low bits; along the last axis."""
    if bits == 8:
        return packed
    pairs = packed.astype(np.uint16)
    return ((pairs | (pairs << 4)) & 0x0F0F).view(np.uint8)


def gather(tensors: Mapping[str, TensorRef], settings: Config) -> Gathered:
    """Group the members of every matrix. Raises UnsupportedError by key, CheckpointError by tensor."""
    for key, allowed in IMPLEMENTED:
        settings.expect(key, *allowed)
    bits = settings.integer("bits")
    group_size = read_group_size(settings, "group_size")
    settings.flag("sym", default=True)
    version = settings.data.get("checkpoint_format") or settings.data.get("format")
    zero_offset = 0 if version == "gptq_v2" else 1
    # Without any g_idx the columns were sorted by whoever wrote the file; one that only some matrices have is a loss.
    needs_order = settings.flag("desc_act", default=False) and any(name.endswith("." + OPTIONAL) for name in tensors)

    def build(name: str, members: Members) -> Source:
        if needs_order and OPTIONAL not in members:
            missing = f"{name.removesuffix('weight')}{OPTIONAL}"
            raise CheckpointError(
                f"missing tensor {missing}", got="others like it and desc_act", fix="download the whole repository"
            )
        qweight = members["qweight"]
        check_dtype(qweight, "I32")
        check_matrix(qweight)
        n_in, n_out = qweight.shape[0] * 32 // bits, qweight.shape[1]
        size = check_members(members, n_in, n_out, 32 // bits, group_size)
        return Gptq(name, (n_out, n_in), refs_of(members), bits, size, zero_offset)

    return gather_groups(tensors, build)
