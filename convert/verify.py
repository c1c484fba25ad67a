"""Is what was written what the checkpoint says? Weights are decoded again and compared with their source, by tensor.

F32, F16 and BF16 must hold the value itself, or no neighbour that is nearer. A quantized type has an error that is its
own: relative RMS error sqrt(Σ(w - w')² / Σw²), which for weights drawn from N(0, σ²) is TYPICAL. It is judged per piece
(a few rows of one expert), so that one expert in another's place shows: unrelated weights of the same size give 1.41,
a scale that is off by two 0.5 or 1. Real weights have outliers and imatrix files shift errors to where they matter
least, so only GROSS times the typical error is taken for a fault, and anything above NOTHING_KNOWN, where a tensor of
zeros (error 1) would be nearly as good.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader

from hymoe import console
from hymoe.convert.checkpoint import Checkpoint
from hymoe.convert.pieces import Piece, cut, in_parallel
from hymoe.convert.plan import Plan
from hymoe.convert.sources import Bytes, Floats
from hymoe.convert.split import PART_NAME, part_name
from hymoe.errors import ModelFileError

if TYPE_CHECKING:
    from rich.table import Table

# Relative RMS error of normally distributed weights, measured with ggml's quantizer (all columns equally important).
TYPICAL = {
    "Q8_0": 0.0054, "Q6_K": 0.0173, "Q5_0": 0.0404, "Q5_1": 0.0338, "Q5_K": 0.0354, "Q4_0": 0.0816, "Q4_1": 0.0699,
    "Q4_K": 0.0707, "IQ4_NL": 0.0749, "IQ4_XS": 0.0755, "MXFP4": 0.1140, "Q3_K": 0.1446, "IQ3_S": 0.1368,
    "IQ3_XXS": 0.1816, "Q2_K": 0.2679, "IQ2_S": 0.2488, "IQ2_XS": 0.2997, "IQ2_XXS": 0.3438, "IQ1_M": 0.4512,
    "IQ1_S": 0.4856,
}  # fmt: skip
GROSS = 5.0
NOTHING_KNOWN = 0.9
# The quantized types scale their blocks by a 16-bit float: RMS errors below this are lost in its smallest step.
SCALE_FLOOR = 3e-5


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> Floats:
    """Decode BF16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# The types that hold floats: an unsigned integer of their width and how its bits are read.
FLOATS: dict[str, tuple[type[np.unsignedinteger[Any]], Callable[[Any], Floats]]] = {
    "F32": (np.uint32, lambda bits: bits.view(np.float32)),
    "F16": (np.uint16, lambda bits: bits.view(np.float16).astype(np.float32)),
    "BF16": (np.uint16, bf16_to_f32),
}


@dataclass
class Error:
    """Errors of some weights: Σ(w - w')², Σw², the largest |w - w'|, and how many weights."""

    squares: float = 0.0
    energy: float = 0.0
    largest: float = 0.0
    count: int = 0

    def add(self, other: Error) -> None:
        """Take in another's weights."""
        self.squares += other.squares
        self.energy += other.energy
        self.largest = max(self.largest, other.largest)
        self.count += other.count

    @property
    def relative(self) -> float:
        """Relative RMS error; infinite where zeros became something."""
        return sqrt(self.squares / self.energy) if self.energy else float("inf" if self.squares else 0.0)


@dataclass(frozen=True)
class Finding:
    """What a comparison of one piece found; `fault` is (got, expected) where it cannot be right."""

    error: Error
    fault: tuple[str, str] | None = None


@dataclass
class Tally:
    """Errors by kind of tensor: (name with * for the layer, source format, type).

    fault: names the first tensor of a file that cannot be right.
    """

    kinds: dict[tuple[str, str, str], Error] = field(default_factory=dict)
    fault: ModelFileError | None = None

    def add(self, name: str, source_format: str, qtype: GGMLQuantizationType, error: Error) -> None:
        """Count the error of a piece of the tensor `name`."""
        kind = re.sub(r"^blk\.\d+\.", "blk.*.", name)
        self.kinds.setdefault((kind, source_format, qtype.name), Error()).add(error)

    def take_in(self, notes: Iterable[Any]) -> None:
        """Add what `note` gave in earlier runs."""
        for note in notes:
            for *kind, error in note:
                self.kinds.setdefault((kind[0], kind[1], kind[2]), Error()).add(Error(*error))

    def note(self) -> list[Any]:
        """Give it as JSON can hold it."""
        return [[*kind, astuple(error)] for kind, error in self.kinds.items()]

    def table(self) -> Table:
        """One line per kind of tensor."""
        from rich.table import Table

        table = Table(box=None, header_style="")
        for column in ("tensor", "source", "type", "relative RMS error", "largest error"):
            table.add_column(column, justify="right" if "error" in column else "left", no_wrap=True)
        for (name, source_format, qtype), error in self.kinds.items():
            shown = ("exact", "0") if error.squares == 0 else (f"{error.relative:.3g}", f"{error.largest:.3g}")
            table.add_row(name, source_format, qtype, *shown)
        return table


def compare(values: Floats, written: Bytes, qtype: GGMLQuantizationType) -> Finding:
    """Compare source values [n_rows, n_per_row] with the bytes of these rows as `qtype`. `values` is overwritten."""
    if qtype.name in FLOATS:
        return _compare_floats(values.reshape(-1), written, qtype.name)
    from hymoe.engine.bindings import dequantize_rows

    decoded = dequantize_rows(written.reshape(len(values), -1), qtype, values.shape[-1])
    error = _error(values, decoded)
    rms = sqrt(error.squares / max(1, error.count))
    limit = min(NOTHING_KNOWN, GROSS * TYPICAL.get(qtype.name, NOTHING_KNOWN))
    if error.relative <= limit or rms <= SCALE_FLOOR:  # not "above": NaN is a fault too
        return Finding(error)
    return Finding(error, (f"a relative RMS error of {error.relative:.3g}", f"at most {limit:.2g} for {qtype.name}"))


def _compare_floats(values: Floats, written: Bytes, name: str) -> Finding:
    kind, decode = FLOATS[name]
    bits = written.view(kind)
    decoded = decode(bits)
    same = decoded.view(np.uint32) == values.view(np.uint32)
    if same.all():
        return Finding(Error(energy=_sum_of_squares(values), count=values.size))
    at = np.flatnonzero(~same)
    wrong = at[~_is_nearest(values[at], bits[at], decode)]
    fault = (f"{decoded[wrong[0]]:g} for {values[wrong[0]]:g}", f"the nearest {name}") if len(wrong) else None
    return Finding(_error(values, decoded), fault)


def _is_nearest(
    values: Floats, bits: npt.NDArray[np.unsignedinteger[Any]], decode: Callable[[Any], Floats]
) -> npt.NDArray[np.bool_]:
    """Whether no neighbour of each written number is nearer to its value, and the sign is kept."""
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    size = bits & ~sign
    wanted = np.abs(values.astype(np.float64))
    with np.errstate(invalid="ignore"):  # next to the largest number is infinity, next to that no number
        below, here, above = (
            decode(near).astype(np.float64) for near in (size - np.minimum(size, size.dtype.type(1)), size, size + 1)
        )
        # Midpoints are exact in float64, differences would not be.
        near_enough = (wanted >= (below + here) / 2) & (wanted <= (here + above) / 2) & np.isfinite(here)
    result: npt.NDArray[np.bool_] = near_enough & (np.signbit(values) == (bits & sign != 0))
    return result


def _error(values: Floats, decoded: Floats) -> Error:
    """Measure, using up both arrays."""
    decoded = decoded.reshape(values.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(decoded, values, out=decoded)
        largest = float(max(decoded.max(), -decoded.min())) if decoded.size else 0.0
        return Error(_sum_of_squares(decoded), _sum_of_squares(values), largest, values.size)


def _sum_of_squares(values: Floats) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # wrong bytes can be any number; infinity says enough of them
        return float(np.sum(np.square(values, out=values), dtype=np.float64))


# -- existing files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF: row-major shape, and where its bytes are."""

    file: Path
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    offset: int


def verify_gguf(path: Path, checkpoint: Checkpoint, plan: Plan) -> Tally:
    """Compare every tensor of a GGUF with its source; of a split one, give the first part. The types are the file's.

    Raises ModelFileError for a file that is no GGUF or none of this checkpoint, and for tensors that cannot have come
    from it, naming the first.
    """
    stored = read_tensors(path)
    pieces = list(_pieces(path, stored, plan))
    _check_others(path, [name for name in stored if name not in {tensor.name for tensor in plan.tensors}])
    tally, faults = Tally(), list[tuple[Piece, tuple[str, str]]]()

    def work(piece: Piece) -> Finding:
        checkpoint.require(piece)
        values = piece.source.read(checkpoint, piece.rows.start, len(piece.rows))
        return compare(values, _read(stored[piece.tensor.name].file, piece), piece.tensor.qtype)

    def done(piece: Piece, finding: Finding) -> None:
        tally.add(piece.tensor.name, piece.source.format, piece.tensor.qtype, finding.error)
        if finding.fault:
            faults.append((piece, finding.fault))
        checkpoint.finished(piece)
        tick(piece.n_source_bytes)

    with console.progress(path.name, sum(piece.n_source_bytes for piece in pieces)) as tick:
        in_parallel(checkpoint, pieces, work, done)
    if faults:
        tally.fault = wrong(path, faults[0][0], faults[0][1], n_more=len({p.tensor.name for p, _ in faults}) - 1)
    return tally


def wrong(path: Path, piece: Piece, fault: tuple[str, str], n_more: int = 0) -> ModelFileError:
    """Say that a tensor is not what its source says; `n_more` others are not either."""
    where = f"{piece.tensor.name}, rows {piece.rows.start} to {piece.rows.stop - 1} of {piece.source}"
    more = f" ({n_more} more tensors are wrong)" if n_more else ""
    return ModelFileError(f"{path.name}: {where}: wrong weights{more}", got=fault[0], expected=fault[1])


def find_gguf(out: Path) -> Path | None:
    """Give the finished GGUF that a conversion to `out` left, or the first of its parts; None where there is none."""
    if out.is_file():
        return out
    parts = sorted(out.parent.glob(f"{glob.escape(out.stem)}-00001-of-?????{out.suffix}"))
    if len(parts) > 1:
        names = " and ".join(part.name for part in parts)
        raise ModelFileError(f"{out}: there are {names}", fix="give the one you mean")
    return parts[0] if parts else None


def read_tensors(path: Path) -> dict[str, Stored]:
    """List the tensors of a GGUF and of all its parts. Raises ModelFileError where one is missing or no GGUF."""
    first, count = _read_part(path)
    found = PART_NAME.fullmatch(path.name)
    if count > 1 and (found is None or int(found["number"]) != 1 or int(found["count"]) != count):
        raise ModelFileError(
            f"{path.name}: one of {count} parts", expected=f"the first: a name that ends in -00001-of-{count:05d}.gguf"
        )
    for index in range(1, count):
        assert found is not None
        tensors, _ = _read_part(part_name(path.with_name(f"{found['stem']}.gguf"), index, count))
        first |= tensors
    return first


def _read_part(path: Path) -> tuple[dict[str, Stored], int]:
    """Give a file's tensors and the number of files of the set."""
    try:
        reader = GGUFReader(path)
        field = reader.get_field("split.count")
        tensors = {
            each.name: Stored(path, tuple(each.shape[::-1].tolist()), each.tensor_type, each.data_offset)
            for each in reader.tensors
        }
        return tensors, int(field.contents()) if field else 1
    except FileNotFoundError as exc:
        raise ModelFileError(f"{path}: no such file") from exc
    except (OSError, ValueError, IndexError, KeyError, OverflowError, TypeError) as exc:
        raise ModelFileError(f"{path}: no GGUF, or a damaged one", got=exc) from exc


def _pieces(path: Path, stored: Mapping[str, Stored], plan: Plan) -> Iterator[Piece]:
    number = 0
    for tensor in plan.tensors:
        if tensor.name not in stored:
            raise ModelFileError(
                f"{path.name}: {tensor.name}", got="no such tensor", expected="one, as in the checkpoint"
            )
        there = stored[tensor.name]
        if there.shape != tensor.shape:
            raise ModelFileError(
                f"{path.name}: shape of {tensor.name}", got=list(there.shape), expected=list(tensor.shape)
            )
        for piece in cut(replace(tensor, qtype=there.qtype), number, 0, there.offset):
            yield piece
            number = piece.number + 1


def _check_others(path: Path, names: list[str]) -> None:
    """Tensors that the checkpoint lacks: one of a layer is another model's; others may be a tool's own."""
    for name in names:
        if name.startswith("blk."):
            raise ModelFileError(f"{path.name}: {name}", got="a tensor", expected="none, as in the checkpoint")
        console.warn(f"{path.name}: {name} is nothing of the checkpoint: not compared")


def _read(file: Path, piece: Piece) -> Bytes:
    data = np.empty(piece.n_bytes, np.uint8)
    with file.open("rb", buffering=0) as stream:
        stream.seek(piece.offset)
        if stream.readinto(data.data) != piece.n_bytes:
            raise ModelFileError(f"{file.name}: truncated in {piece.tensor.name}")
    return data
