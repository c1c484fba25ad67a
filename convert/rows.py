"""A checkpoint folder as hymoe.imatrix.weights.Weights: rows of the tensors that its GGUF would have.

Weights may be absent altogether: then there are names and shapes, for a look at what a recipe would be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hymoe.convert.convert import Conversion, prepare
from hymoe.convert.split import lay_out
from hymoe.imatrix.weights import Floats, Tensor, hparams_of


class CheckpointRows:
    """See hymoe.imatrix.weights.Weights."""

    def __init__(self, folder: Path, conversion: Conversion) -> None:
        self._conversion = conversion
        self._planned = {tensor.name: tensor for tensor in conversion.plan.tensors}
        self.tensors = {tensor.name: Tensor(tensor.shape, tensor.qtype) for tensor in conversion.plan.tensors}
        self.hparams = hparams_of(conversion.arch.name, {key.key: key.value for key in conversion.keys})
        self.has_values = "weights" not in conversion.unseen
        self.identity = hashlib.sha256(repr(sorted(conversion.inputs.items())).encode()).hexdigest()
        self.gguf: Path | None = None
        # A look has no merges, and gguf-py writes no empty list.
        keys = (key for key in conversion.keys if key.kind != "ARRAY" or key.value)
        (part,) = lay_out(folder / "unwritten.gguf", conversion.plan, conversion.arch.name, keys)
        self.head_bytes = len(part.head)

    def rows(self, name: str, index: int, rows: range) -> Floats:
        """Give rows of slice `index` of a tensor, [len(rows), n_per_row]."""
        source = self._planned[name].sources[index]
        return source.read(self._conversion.checkpoint, rows.start, len(rows))


@contextmanager
def open_rows(folder: Path) -> Iterator[CheckpointRows]:
    """Open a folder. Raises what `convert.prepare` raises."""
    conversion = prepare(folder, "BF16", look=True)
    if not conversion.unseen:
        conversion = prepare(folder, "BF16")
    with conversion.checkpoint:
        yield CheckpointRows(folder, conversion)
