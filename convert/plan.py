"""The conversion plan: every tensor of the GGUF with its type, bytes and sources, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from gguf import GGMLQuantizationType, LlamaFileType

from hymoe import sizes
from hymoe.convert.architectures import Architecture, Row
from hymoe.convert.checkpoint import TensorRef
from hymoe.convert.quants import Matrix, Wanted, targets
from hymoe.convert.sources import Floats, Gathered, Source
from hymoe.convert.sources.plain import DECODE, Plain
from hymoe.errors import CheckpointError


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: row-major `shape`, and its sources in order (experts stacked, one each).

    importance: weight of each column's error for the quantizer, [one for each source, n_per_row].
    """

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    sources: tuple[Source, ...]
    importance: Floats | None = field(default=None, compare=False, repr=False)

    @property
    def n_bytes(self) -> int:
        """Bytes in the output, padding not counted."""
        return sizes.tensor_bytes(self.shape, self.qtype)

    def importance_of(self, index: int) -> Floats | None:
        """Importance of the columns of source `index`, [n_per_row], where there is any."""
        return None if self.importance is None else self.importance[index]


@dataclass(frozen=True)
class Plan:
    """All tensors in file order, and what was dropped on purpose."""

    quant: str
    file_type: LlamaFileType
    tensors: tuple[PlannedTensor, ...]
    dropped: tuple[TensorRef | Source, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of the data section, padding included."""
        return sizes.data_bytes((tensor.shape, tensor.qtype) for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(source.n_bytes for tensor in self.tensors for source in tensor.sources)

    @property
    def n_params(self) -> int:
        """Number of weights in the file."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


def make_plan(gathered: Gathered, arch: Architecture, wanted: Wanted) -> Plan:
    """Match the checkpoint's sources against the architecture's rows, both ways, and lay out the GGUF.

    Raises CheckpointError for a tensor that is missing, unexpected, misshapen or of the wrong dtype, by name and file;
    what quants.targets raises where the types wanted cannot be had.
    """
    left = dict(gathered[0])
    n_sources = len(left)
    stacks: list[tuple[Matrix, tuple[Source, ...]]] = []
    dropped: list[TensorRef | Source] = [*gathered[1]]
    for row, layer in arch.unrolled():
        sources = tuple(_take(left, n_sources, arch, row, layer))
        if row.gguf is None:
            dropped += sources
        elif sources:
            stacks.append((_matrix(arch, row, layer, sources), sources))
    if left:
        source = next(iter(left.values()))
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(f"unexpected tensor {source}{more}", fix=f"config.json describes a {arch.name} without")
    chosen = targets(arch, wanted, [matrix for matrix, _ in stacks])
    planned = (
        PlannedTensor(matrix.name, matrix.shape, target.qtype, sources, target.importance)
        for (matrix, sources), target in zip(stacks, chosen, strict=True)
    )
    return Plan(wanted.quant.value, wanted.quant.file_type, tuple(planned), tuple(dropped))


def _take(left: dict[str, Source], n_sources: int, arch: Architecture, row: Row, layer: int) -> Iterator[Source]:
    shape = arch.shape(row)
    for name in arch.stored_names(row, layer):
        source = left.pop(name, None)
        if source is None:
            if row.optional:
                continue
            raise CheckpointError(
                f"missing tensor {name}", got=f"{n_sources} others", fix="download the whole repository"
            )
        if source.shape != shape:
            raise CheckpointError(
                f"shape of {source}", got=list(source.shape), expected=f"{list(shape)} = {list(row.shape)}"
            )
        if isinstance(source, Plain) and source.format not in DECODE:
            raise CheckpointError(f"dtype of {source}", got=source.format, expected=" or ".join(DECODE))
        yield source


def _matrix(arch: Architecture, row: Row, layer: int, sources: tuple[Source, ...]) -> Matrix:
    assert row.gguf is not None
    shape = sources[0].shape if "{e}" not in row.hf else (arch.n_expert, *sources[0].shape)
    return Matrix(row.gguf.format(l=layer), shape, row.precision == "f32")
