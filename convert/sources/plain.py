"""Weights stored as they are: BF16, F16 or F32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from hymoe.convert.checkpoint import Checkpoint, TensorRef
from hymoe.convert.sources import Bytes, Floats, Gathered, Source

# dtype -> the GGUF type that holds the very same bytes
SAME = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}


def _bf16_to_f32(raw: Bytes) -> Floats:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


DECODE: dict[str, Callable[[Bytes], Floats]] = {
    "BF16": _bf16_to_f32,
    "F16": lambda raw: raw.view(np.float16).astype(np.float32),
    "F32": lambda raw: raw.view(np.float32),
}


@dataclass(frozen=True)
class Plain(Source):
    """One stored tensor; `dtype` is one of DECODE, or something planning will refuse."""

    @property
    def format(self) -> str:
        """The stored dtype."""
        return self.refs[0].dtype

    def read(self, checkpoint: Checkpoint, first: int, count: int) -> Floats:
        """Decode rows [first, first + count)."""
        return DECODE[self.format](self.read_bytes(checkpoint, first, count)).reshape(count, self.n_per_row)

    def read_bytes(self, checkpoint: Checkpoint, first: int, count: int) -> Bytes:
        """Give the stored bytes of rows [first, first + count)."""
        row = self.n_bytes // self.n_rows
        raw = np.empty(count * row, np.uint8)
        checkpoint.read_into(self.refs[0], first * row, raw.data)
        return raw


def gather(tensors: Mapping[str, TensorRef]) -> Gathered:
    """Every stored tensor is a source."""
    return {name: Plain(name, ref.shape, (ref,)) for name, ref in tensors.items()}, ()
