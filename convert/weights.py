"""Weights from the checkpoint's float formats to the file's types, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from hymoe.convert.checkpoint import TensorRef
from hymoe.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Types that hold the source's very bytes.
SAME = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}


def encoder(ref: TensorRef, qtype: GGMLQuantizationType, n_per_row: int) -> Callable[[Bytes], Bytes]:
    """Give a function from source bytes (whole rows of n_per_row elements) to the bytes of `qtype`."""
    if SAME.get(ref.dtype) == qtype:
        return lambda raw: raw
    if qtype not in ENCODE:
        from hymoe.engine.bindings import quantize_rows

        return lambda raw: quantize_rows(DECODE[ref.dtype](raw).reshape(-1, n_per_row), qtype).reshape(-1)
    return lambda raw: ENCODE[qtype](DECODE[ref.dtype](raw), ref).view(np.uint8)


def _bf16_to_f32(raw: Bytes) -> Floats:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _f32_to_f16(x: Floats, ref: TensorRef) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        y = x.astype(np.float16)
    lost = np.isinf(y) & np.isfinite(x)
    if lost.any():
        raise CheckpointError(
            f"{ref} as F16", got=f"the value {x[lost][0]:g}", expected="at most 65504", fix="choose --quant BF16"
        )
    return y


def _f32_to_bf16(x: Floats, _ref: TensorRef) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; NaN stays NaN (quiet), as ggml_compute_fp32_to_bf16 does."""
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 64, rounded).astype(np.uint16)


DECODE: dict[str, Callable[[Bytes], Floats]] = {
    "F32": lambda raw: raw.view(np.float32),
    "F16": lambda raw: raw.view(np.float16).astype(np.float32),
    "BF16": _bf16_to_f32,
}
ENCODE: dict[GGMLQuantizationType, Callable[[Floats, TensorRef], npt.NDArray[np.generic]]] = {
    GGMLQuantizationType.F32: lambda x, _ref: x,
    GGMLQuantizationType.F16: _f32_to_f16,
    GGMLQuantizationType.BF16: _f32_to_bf16,
}
