"""Weights from exact floats to the file's types, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from hymoe.convert.checkpoint import Checkpoint
from hymoe.convert.sources import Bytes, Floats, Source
from hymoe.convert.sources.plain import SAME, Plain
from hymoe.errors import CheckpointError


def encoded(
    checkpoint: Checkpoint,
    source: Source,
    rows: range,
    qtype: GGMLQuantizationType,
    importance: Floats | None = None,
) -> Bytes:
    """Read rows of a source and give their bytes as `qtype`. importance: weight of each column's error [n_per_row].

    Raises CheckpointError for values that the type cannot hold, by tensor.
    """
    if isinstance(source, Plain) and SAME.get(source.format) == qtype:
        return source.read_bytes(checkpoint, rows.start, len(rows))
    values = source.read(checkpoint, rows.start, len(rows))
    if qtype in ENCODE:
        return np.ascontiguousarray(ENCODE[qtype](values, source)).view(np.uint8).reshape(-1)
    from hymoe.engine.bindings import quantize_rows

    return quantize_rows(values, qtype, importance=importance).reshape(-1)


def _f32_to_f16(x: Floats, source: Source) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        y = x.astype(np.float16)
    lost = np.isinf(y) & np.isfinite(x)
    if lost.any():
        raise CheckpointError(
            f"{source} as F16", got=f"the value {x[lost][0]:g}", expected="at most 65504", fix="choose --quant BF16"
        )
    return y


def _f32_to_bf16(x: Floats, _source: Source) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; NaN stays NaN (quiet), as ggml_compute_fp32_to_bf16 does."""
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 64, rounded).astype(np.uint16)


ENCODE: dict[GGMLQuantizationType, Callable[[Floats, Source], npt.NDArray[np.generic]]] = {
    GGMLQuantizationType.F32: lambda x, _source: x,
    GGMLQuantizationType.F16: _f32_to_f16,
    GGMLQuantizationType.BF16: _f32_to_bf16,
}
