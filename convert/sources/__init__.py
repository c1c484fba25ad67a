"""Exact float values of a checkpoint's weights, whatever format they are stored in.

A Source is one logical tensor under its plain name ("model.layers.0.self_attn.q_proj.weight"), read from one stored
tensor or, in a quantized checkpoint, from several. Each format has a small file of its own with a function
`gather(tensors, settings) -> Gathered` that groups the stored tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import cast

import numpy as np
import numpy.typing as npt

from hymoe.convert.checkpoint import Checkpoint, TensorRef
from hymoe.convert.config import Config
from hymoe.errors import UnsupportedError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# quant_method of config.json's quantization_config -> module; resolved when met.
FORMATS = {
    "fp8": "hymoe.convert.sources.fp8",
    "compressed-tensors": "hymoe.convert.sources.fp8",
    "gptq": "hymoe.convert.sources.gptq",
    "awq": "hymoe.convert.sources.awq",
}


@dataclass(frozen=True)
class Source(ABC):
    """One logical tensor of row-major `shape` [..., n_per_row] and the stored tensors it is read from."""

    name: str
    shape: tuple[int, ...]
    refs: tuple[TensorRef, ...]

    @property
    @abstractmethod
    def format(self) -> str:
        """What plans and messages call the format: "BF16", "FP8", "GPTQ-Int4", …."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint, first: int, count: int) -> Floats:
        """Give the exact values of rows [first, first + count) as float32 [count, n_per_row]; from any thread.

        Raises CheckpointError for stored values that mean no number, naming tensor and place.
        """

    @property
    def n_per_row(self) -> int:
        """Elements of one row."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Number of rows; a vector is one."""
        return prod(self.shape[:-1])

    @property
    def n_bytes(self) -> int:
        """Stored bytes."""
        return sum(ref.n_bytes for ref in self.refs)

    def __str__(self) -> str:
        """Name the tensor and its file, as error messages do."""
        return str(self.refs[0]) if self.refs[0].name == self.name else f"{self.name} ({self.refs[0].file.name})"


Gathered = tuple[dict[str, Source], tuple[TensorRef, ...]]


def gather(checkpoint: Checkpoint, config: Config) -> Gathered:
    """Group the stored tensors into sources, by name, as config.json's quantization_config says.

    Gives the sources and the stored tensors that are dropped on purpose. A stored tensor that belongs to no group is a
    source of its own under its stored name, so that planning finds it unexpected.
    Raises UnsupportedError for a format that is not implemented, CheckpointError for a group that does not add up.
    """
    if not config.has("quantization_config"):
        from hymoe.convert.sources import plain

        return plain.gather(checkpoint.tensors)
    settings = config.sub("quantization_config")
    method = settings.data.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise UnsupportedError(f"{settings.source}: quant_method", got=method, expected=f"one of {', '.join(FORMATS)}")
    module = import_module(FORMATS[method])
    return cast(Callable[[Mapping[str, TensorRef], Config], Gathered], module.gather)(checkpoint.tensors, settings)
