"""The conversion plan: every tensor of the GGUF with its type, bytes and sources, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from gguf import GGMLQuantizationType, LlamaFileType

from hymoe import sizes
from hymoe.convert.architectures import Architecture, Row
from hymoe.convert.checkpoint import Checkpoint, TensorRef
from hymoe.errors import CheckpointError, UnsupportedError

FLOAT_DTYPES = ("BF16", "F16", "F32")

# --quant -> type of the matrices, general.file_type
QUANTS = {
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
NEEDS_NO_ENGINE = ("F32", "F16", "BF16")  # the others are made by ggml's own quantizer


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: row-major `shape`, and its sources in order (experts stacked, one each)."""

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    sources: tuple[TensorRef, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes in the output, padding not counted."""
        return sizes.tensor_bytes(self.shape, self.qtype)


@dataclass(frozen=True)
class Plan:
    """All tensors in file order, and what was dropped on purpose."""

    quant: str
    file_type: LlamaFileType
    tensors: tuple[PlannedTensor, ...]
    dropped: tuple[TensorRef, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of the data section, padding included."""
        return sizes.data_bytes((tensor.shape, tensor.qtype) for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(ref.n_bytes for tensor in self.tensors for ref in tensor.sources)

    @property
    def n_params(self) -> int:
        """Number of weights in the file."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


def make_plan(checkpoint: Checkpoint, arch: Architecture, quant: str) -> Plan:
    """Match the checkpoint against the architecture's rows, both ways, and lay out the GGUF.

    Raises CheckpointError for a tensor that is missing, unexpected, misshapen or of the wrong dtype, by name and file;
    UnsupportedError where a row of weights is no whole number of blocks of the wanted type.
    """
    left = dict(checkpoint.tensors)
    target, file_type = QUANTS[quant]
    planned: list[PlannedTensor] = []
    dropped: list[TensorRef] = []
    for row, layer in _unroll(arch):
        refs = tuple(_take(left, checkpoint, arch, row, layer))
        if row.gguf is None:
            dropped += refs
        elif refs:
            planned.append(_planned(arch, row, layer, refs, target))
    if left:
        ref = next(iter(left.values()))
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(f"unexpected tensor {ref}{more}", fix=f"config.json describes a {arch.name} without it")
    return Plan(quant, file_type, tuple(planned), tuple(dropped))


def _unroll(arch: Architecture) -> Iterator[tuple[Row, int]]:
    """Rows without a layer first, then layer by layer: what a layer needs lies together in the file."""
    for row in arch.rows:
        if "{l}" not in row.hf:
            yield row, 0
    layered = [row for row in arch.rows if "{l}" in row.hf]
    for layer in range(arch.n_layer):
        yield from ((row, layer) for row in layered)


def _take(
    left: dict[str, TensorRef], checkpoint: Checkpoint, arch: Architecture, row: Row, layer: int
) -> Iterator[TensorRef]:
    shape = tuple(arch.sizes[symbol] for symbol in row.shape)
    for expert in range(arch.n_expert) if "{e}" in row.hf else (0,):
        name = row.hf.format(l=layer, e=expert)
        ref = left.pop(name, None)
        if ref is None:
            if row.optional:
                continue
            raise CheckpointError(
                f"missing tensor {name}",
                got=f"{len(checkpoint.tensors)} others in {checkpoint.folder}",
                fix="download the whole repository",
            )
        if ref.shape != shape:
            raise CheckpointError(f"shape of {ref}", got=list(ref.shape), expected=f"{list(shape)} = {list(row.shape)}")
        if ref.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"dtype of {ref}", got=ref.dtype, expected=" or ".join(FLOAT_DTYPES))
        yield ref


def _planned(
    arch: Architecture, row: Row, layer: int, refs: tuple[TensorRef, ...], target: GGMLQuantizationType
) -> PlannedTensor:
    assert row.gguf is not None
    shape = refs[0].shape if "{e}" not in row.hf else (arch.n_expert, *refs[0].shape)
    qtype = GGMLQuantizationType.F32 if row.precision == "f32" else target
    name = row.gguf.format(l=layer)
    try:
        sizes.row_bytes(shape[-1], qtype)
    except ValueError as exc:
        raise UnsupportedError(f"{name} as {qtype.name}: {exc}", fix="choose --quant BF16") from exc
    return PlannedTensor(name, shape, qtype, refs)
