"""FP8: 8-bit floats (E4M3, without infinities) with one scale for the matrix or one for every output.

    X.weight        F8_E4M3 [n_out, n_in]
    X.weight_scale  BF16, F16 or F32: [], [1] or [1, 1], or [n_out] or [n_out, 1]
    W = weight · weight_scale, in float32

Written so by quant_method "fp8" (Tencent's own releases) and by "compressed-tensors". Scales of activations and of the
KV cache (input_scale, output_scale, k_scale, v_scale, kv_scale) say nothing about the weights and are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hymoe.convert.checkpoint import Checkpoint, TensorRef
from hymoe.convert.config import Config
from hymoe.convert.sources import Floats, Gathered, Source
from hymoe.convert.sources.grouped import check_dtype, check_matrix, check_scales
from hymoe.convert.sources.plain import DECODE, Plain
from hymoe.errors import CheckpointError, UnsupportedError

FLOAT8 = "F8_E4M3"

# Keys that change what the bytes mean, with the values implemented here.
Implemented = tuple[tuple[str, tuple[Any, ...]], ...]
FP8: Implemented = (
    ("activation_scheme", ("static", "dynamic")),
    ("weight_block_size", (None,)),
    ("fmt", ("e4m3", "e4m3fn", "float8_e4m3fn")),
)
COMPRESSED_FORMATS = ("naive-quantized", "float-quantized")
COMPRESSED: Implemented = (
    ("format", COMPRESSED_FORMATS),
    ("transform_config", ({},)),
)
COMPRESSED_WEIGHTS: Implemented = (
    ("type", ("float",)),
    ("num_bits", (8,)),
    ("strategy", ("tensor", "channel")),
    ("symmetric", (True,)),
    ("dynamic", (False,)),
    ("group_size", (None,)),
    ("block_structure", (None,)),
    ("actorder", (None,)),
)


def _e4m3() -> Floats:
    """Every byte's value: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F and 0xFF are NaN."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values = np.where(byte & 0x80, -size, size)
    values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)


E4M3 = _e4m3()


@dataclass(frozen=True)
class Fp8(Source):
    """A matrix; refs are weight and weight_scale."""

    @property
    def format(self) -> str:
        """FP8."""
        return "FP8"

    def read(self, checkpoint: Checkpoint, first: int, count: int) -> Floats:
        """Dequantize rows [first, first + count)."""
        weight, scale_ref = self.refs
        raw = np.empty(count * self.n_per_row, np.uint8)
        checkpoint.read_into(weight, first * self.n_per_row, raw.data)
        scale = self._scale(checkpoint, scale_ref)
        with np.errstate(over="ignore"):  # an infinite product is refused with the other values that mean no number
            if scale.size == 1:
                return (E4M3 * scale.reshape(())).take(raw, mode="clip").reshape(count, self.n_per_row)
            values = E4M3.take(raw, mode="clip").reshape(count, self.n_per_row)
            values *= scale.reshape(-1, 1)[first : first + count]
        return values

    def _scale(self, checkpoint: Checkpoint, ref: TensorRef) -> Floats:
        raw = np.empty(ref.n_bytes, np.uint8)
        checkpoint.read_into(ref, 0, raw.data)
        scale = DECODE[ref.dtype](raw).reshape(ref.shape)
        check_scales(ref, scale)
        return scale


def gather(tensors: Mapping[str, TensorRef], settings: Config) -> Gathered:
    """Join every weight of 8-bit floats and its scale. Raises UnsupportedError by key, CheckpointError by tensor."""
    if settings.data["quant_method"] == "fp8":
        _expect(settings, FP8)
    else:
        _check_compressed(settings)
    sources: dict[str, Source] = {}
    dropped: list[TensorRef] = []
    for name, ref in tensors.items():
        scale_name = f"{name}_scale"
        if name.endswith(".weight") and (scale_name in tensors or ref.dtype == FLOAT8):
            sources[name] = _joined(name, ref, tensors.get(scale_name))
        elif name.endswith(".weight_scale") and name.removesuffix("_scale") in tensors:
            continue
        elif name.endswith("_scale") and not name.endswith(".weight_scale"):
            dropped.append(ref)
        else:
            sources[name] = Plain(name, ref.shape, (ref,))
    return sources, tuple(dropped)


def _joined(name: str, weight: TensorRef, scale: TensorRef | None) -> Fp8:
    if scale is None:
        raise CheckpointError(
            f"missing tensor {name}_scale", got=f"{weight} of {FLOAT8}", fix="download the whole repository"
        )
    check_dtype(weight, FLOAT8)
    check_matrix(weight)
    check_dtype(scale, *DECODE)
    n_out = weight.shape[0]
    if scale.shape not in ((), (1,), (1, 1), (n_out,), (n_out, 1)):
        raise CheckpointError(
            f"shape of {scale}", got=list(scale.shape), expected=f"one scale, or {n_out}, one per output of {name}"
        )
    return Fp8(name, weight.shape, (weight, scale))


def _check_compressed(settings: Config) -> None:
    """Refuse by key what is not one group of 8-bit float weights."""
    _expect(settings, COMPRESSED)
    groups = settings.sub("config_groups")
    if len(groups.data) != 1:
        raise UnsupportedError(f"{settings.source}: config_groups", got=f"{len(groups.data)} groups", expected="one")
    group = groups.sub(*groups.data)
    group.expect("format", *COMPRESSED_FORMATS)
    weights = group.sub("weights")
    for key in ("type", "num_bits", "strategy"):
        if not weights.has(key):
            raise CheckpointError(f"{group.source}: weights: {key}", got="nothing", expected="a value")
    _expect(weights, COMPRESSED_WEIGHTS)
    sparsity = settings.sub("sparsity_config")
    sparsity.expect("format", "dense")


def _expect(settings: Config, implemented: Implemented) -> None:
    for key, allowed in implemented:
        settings.expect(key, *allowed)
