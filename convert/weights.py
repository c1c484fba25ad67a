"""Weights from exact floats to the file's types, a chunk of rows at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from threading import Lock

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from hymoe import console
from hymoe.convert.checkpoint import FETCH_AGAIN, Checkpoint
from hymoe.convert.sources import Bytes, Floats, Source
from hymoe.convert.sources.plain import SAME, Plain
from hymoe.errors import CheckpointError

# dtype -> an integer of the same width, and the bits of infinity
BITS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


class ZeroRows:
    """Rows that hold nothing but zeros, counted per source while they pass by. Safe from several threads."""

    def __init__(self) -> None:
        self._rows: Counter[Source] = Counter()
        self._lock = Lock()

    def add(self, source: Source, n_rows: int) -> None:
        """Count rows of a source."""
        with self._lock:
            self._rows[source] += n_rows

    def warn(self) -> None:
        """Warn of sources that are zero throughout, once per kind of tensor."""
        kinds: dict[str, list[str]] = {}
        for source, n_rows in self._rows.items():
            if n_rows == source.n_rows:
                kinds.setdefault(re.sub(r"\.\d+\.", ".*.", source.name), []).append(source.name)
        for kind, names in kinds.items():
            if len(names) == 1:
                console.warn(f"{names[0]} is all zeros")
            else:
                console.warn(f"{kind}: {len(names)} tensors are all zeros, such as {min(names)}")


def encoded(
    checkpoint: Checkpoint,
    source: Source,
    rows: range,
    qtype: GGMLQuantizationType,
    importance: Floats | None = None,
    *,
    zeros: ZeroRows | None = None,
) -> Bytes:
    """Read rows of a source and give their bytes as `qtype`. importance: weight of each column's error [n_per_row].

    Rows that are all zeros are counted in `zeros`.
    Raises CheckpointError for values that are no number or that the type cannot hold, by tensor.
    """
    if isinstance(source, Plain) and SAME.get(source.format) == qtype:
        raw = source.read_bytes(checkpoint, rows.start, len(rows))
        _check(checkpoint, source, rows, raw, dtype=source.format, zeros=zeros)
        return raw
    values = source.read(checkpoint, rows.start, len(rows))
    _check(checkpoint, source, rows, values.view(np.uint8), dtype="F32", zeros=zeros)
    if qtype in ENCODE:
        return np.ascontiguousarray(ENCODE[qtype](values, source)).view(np.uint8).reshape(-1)
    from hymoe.engine.bindings import quantize_rows

    try:
        return quantize_rows(values, qtype, importance=importance).reshape(-1)
    except FloatingPointError as exc:
        raise CheckpointError(f"{source} as {qtype.name}", got=exc, fix="choose --quant BF16") from exc


def _check(
    checkpoint: Checkpoint, source: Source, rows: range, raw: Bytes, *, dtype: str, zeros: ZeroRows | None
) -> None:
    """Refuse NaN and infinity in the rows' bytes; count rows of zeros. Costs two reductions and no memory."""
    kind, infinity = BITS[dtype]
    bits = raw.view(kind)
    sign = 1 << (8 * bits.itemsize - 1)
    # Floats in the order of their size: read as unsigned integers the negative ones come last, as signed the positive.
    negative, positive = int(bits.max()), int(bits.view(f"i{bits.itemsize}").max())
    if negative >= sign | infinity or positive >= infinity:
        raise _not_finite(checkpoint, source, rows)
    if zeros is not None and negative <= sign and positive <= 0:
        zeros.add(source, len(rows))


def _not_finite(checkpoint: Checkpoint, source: Source, rows: range) -> CheckpointError:
    """Name the first such value of the source: other rows of it, before these, may be in another thread's hands."""
    for first in range(0, rows.stop, len(rows)):
        values = source.read(checkpoint, first, min(len(rows), rows.stop - first)).reshape(-1)
        wrong = ~np.isfinite(values)
        if wrong.any():
            break
    at = int(wrong.argmax())
    row, column = divmod(at, source.n_per_row)
    place = [first + row, column] if len(source.shape) > 1 else [column]
    return CheckpointError(
        f"{source} at {place}", got=f"the weight {values[at]:g}", expected="a finite number", fix=FETCH_AGAIN
    )


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
    """Round to nearest, ties to even, as ggml_compute_fp32_to_bf16 does; there are no NaN here."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


ENCODE: dict[GGMLQuantizationType, Callable[[Floats, Source], npt.NDArray[np.generic]]] = {
    GGMLQuantizationType.F32: lambda x, _source: x,
    GGMLQuantizationType.F16: _f32_to_f16,
    GGMLQuantizationType.BF16: _f32_to_bf16,
}
