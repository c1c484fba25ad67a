"""What each type does to each tensor, measured: relative error of the output, from samples of its rows.

For a row w of a matrix and inputs x, E[((w - w')·x)²] / E[(w·x)²], with x's columns taken as uncorrelated: then
both are sums over columns j weighted by E[x_j²], the importance. A stack of experts weighs each by the tokens it met.
Rows are a sample with a fixed seed; they are quantized as the converter does it, by ggml with the importance.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from hymoe.errors import ModelFileError
from hymoe.imatrix.files import WITHOUT_DATA, Imatrix
from hymoe.imatrix.weights import Floats, Tensor, Weights

# Rows per tensor: the error of a matrix from 128 rows of 256 is known to a per cent, of wider ones better.
N_SAMPLE: Final = 128
SEED: Final = 20251
FLOATS: Final = ("F32", "F16", "BF16")
# Without importance llama-quantize and the converter, which asks the engine, refuse these.
NEED_IMPORTANCE: Final = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")

Errors = dict[str, dict[str, float]]
"""Relative squared error of the output by tensor and type."""


def importance_of(imatrix: Imatrix | None, tensors: Mapping[str, Tensor]) -> dict[str, Floats]:
    """Give the importance of columns, [n_slice, n_per_row], of every tensor that the imatrix has.

    Raises ModelFileError for the imatrix of another model, naming the first tensor that disagrees.
    """
    if imatrix is None:
        return {}
    other = f"{imatrix.name}: the importance matrix of another model"
    found = {}
    for name in imatrix.entries:
        values = imatrix.importance(name)
        if name not in tensors:
            if name.startswith("blk."):
                raise ModelFileError(other, got=f"an entry for {name}", expected="the tensors of this one")
            continue
        tensor = tensors[name]
        expected = tensor.n_slice * tensor.shape[-1]
        if values.size != expected:
            raise ModelFileError(other, got=f"{values.size} values for {name}", expected=expected)
        found[name] = values.reshape(tensor.n_slice, -1)
    if not found:
        raise ModelFileError(other, got="no entry for any tensor of this one")
    # All columns alike is better than nothing: without importance ggml weighs errors by the size of the weights, with
    # it by what they cost. The converter does the same with a recipe.
    for name in WITHOUT_DATA:
        if name in tensors and name not in found:
            found[name] = np.ones((1, tensors[name].shape[-1]), np.float32)
    return found


def usage_of(imatrix: Imatrix | None, name: str, tensor: Tensor) -> NDArray[np.float64]:
    """Give each slice's share of the tokens, [n_slice]; alike where nothing is known."""
    counts = None if imatrix is None or name not in imatrix.entries else imatrix.entries[name].counts
    if counts is None or len(counts) != tensor.n_slice or not counts.sum():
        return np.full(tensor.n_slice, 1 / tensor.n_slice)
    return np.asarray(counts / counts.sum(), np.float64)


def measure(
    weights: Weights,
    names: Sequence[str],
    types: Sequence[GGMLQuantizationType],
    imatrix: Imatrix | None,
    tick: Callable[[float], None],
    *,
    n_threads: int,
) -> Errors:
    """Measure every tensor's error as every type that its rows can have. `tick` counts tensors.

    A type that ggml makes only with importance is left out where there is none.
    """
    importance = importance_of(imatrix, weights.tensors)

    def work(name: str) -> dict[str, float]:
        tensor = weights.tensors[name]
        return _errors(weights, name, types, importance.get(name), usage_of(imatrix, name, tensor))

    found = {}
    with ThreadPoolExecutor(n_threads) as pool:
        for name, errors in zip(names, pool.map(work, names), strict=True):
            found[name] = errors
            tick(1)
    return found


def _errors(
    weights: Weights,
    name: str,
    types: Sequence[GGMLQuantizationType],
    importance: Floats | None,
    usage: NDArray[np.float64],
) -> dict[str, float]:
    tensor = weights.tensors[name]
    sample = [(index, weights.rows(name, index, rows)) for index, rows in sampled(name, tensor)]
    result = {}
    for qtype in types:
        if not is_possible(qtype, tensor.shape[-1], importance is not None):
            continue
        squares = energy = 0.0
        for index, values in sample:
            weight = None if importance is None else importance[index]
            change = requantized(values, qtype, weight) - values
            columns = np.ones(values.shape[1], np.float64) if weight is None else weight.astype(np.float64)
            squares += usage[index] * float(np.square(change, dtype=np.float64).sum(0) @ columns)
            energy += usage[index] * float(np.square(values, dtype=np.float64).sum(0) @ columns)
        result[qtype.name] = squares / energy if energy else 0.0
    return result


def sampled(name: str, tensor: Tensor) -> list[tuple[int, range]]:
    """Choose rows of each slice: one run of neighbours from a place that the seed and the name decide."""
    random = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    n = min(tensor.n_rows, max(1, N_SAMPLE // tensor.n_slice))
    starts = random.integers(0, tensor.n_rows - n + 1, tensor.n_slice)
    return [(index, range(start, start + n)) for index, start in enumerate(map(int, starts))]


def is_possible(qtype: GGMLQuantizationType, n_per_row: int, has_importance: bool) -> bool:
    """Whether rows of this width can have the type, and importance is there where it is needed."""
    return n_per_row % GGML_QUANT_SIZES[qtype][0] == 0 and (has_importance or qtype.name not in NEED_IMPORTANCE)


def requantized(values: Floats, qtype: GGMLQuantizationType, importance: Floats | None) -> Floats:
    """Give rows as they are after the type, [n_rows, n_per_row]."""
    from hymoe.engine.bindings import dequantize_rows, quantize_rows

    if qtype.name in FLOATS:
        return _rounded(values, qtype.name)
    return dequantize_rows(quantize_rows(values, qtype, importance=importance), qtype, values.shape[1])


def _rounded(values: Floats, name: str) -> Floats:
    if name == "F32":
        return values
    if name == "F16":
        return values.astype(np.float16).astype(np.float32)
    return from_bf16(to_bf16(values))


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    """Decode BF16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
