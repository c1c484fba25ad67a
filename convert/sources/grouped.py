"""What GPTQ and AWQ share: small integers with a scale and a zero point for every group of input columns.

    W[o, i] = scales[g(i), o] · (q[o, i] − zero[g(i), o])        difference and product in float32

Both store matrices the other way round: a stored row belongs to one input column (or to the few of one 32-bit word)
and runs over the outputs, so that some rows of W are some columns of every stored tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hymoe.convert.checkpoint import FETCH_AGAIN, Checkpoint, TensorRef
from hymoe.convert.config import Config
from hymoe.convert.sources import Bytes, Floats, Gathered, Source
from hymoe.convert.sources.plain import DECODE, Plain
from hymoe.errors import CheckpointError

BLOCK_BYTES = 1 << 20
REQUIRED = ("qweight", "qzeros", "scales")
OPTIONAL = "g_idx"

Members = Mapping[str, TensorRef]


@dataclass(frozen=True)
class Grouped(Source):
    """A matrix [n_out, n_in] of `bits`-bit integers; `group_size` columns share scale and zero point.

    refs are qweight, qzeros, scales and, where columns choose their group themselves, g_idx.
    """

    bits: int
    group_size: int

    @abstractmethod
    def integers(self, checkpoint: Checkpoint, first: int, count: int) -> Bytes:
        """Give the stored integers of rows [first, first + count): [count, n_in]."""

    @abstractmethod
    def zeros(self, checkpoint: Checkpoint, first: int, count: int) -> Floats:
        """Give the zero points of rows [first, first + count): [n_groups, count]."""

    def read(self, checkpoint: Checkpoint, first: int, count: int) -> Floats:
        """Dequantize rows [first, first + count)."""
        scales = self._scales(checkpoint, first, count).T
        zeros = self.zeros(checkpoint, first, count).T
        values = self.integers(checkpoint, first, count).astype(np.float32)
        group_of = self._group_of(checkpoint)
        with np.errstate(over="ignore"):  # an infinite product is refused with the other values that mean no number
            if group_of is None:
                groups = values.reshape(count, -1, self.group_size)
                groups -= zeros[:, :, None]
                groups *= scales[:, :, None]
            else:
                values -= zeros.take(group_of, axis=1)
                values *= scales.take(group_of, axis=1)
        return values

    def _scales(self, checkpoint: Checkpoint, first: int, count: int) -> Floats:
        """Read and check [n_groups, count] scales."""
        ref = self.refs[2]
        raw = columns(checkpoint, ref, first, count)
        scales = DECODE[ref.dtype](raw).reshape(raw.shape[0], count)
        check_scales(ref, scales, first)
        return scales

    def _group_of(self, checkpoint: Checkpoint) -> npt.NDArray[np.int32] | None:
        """Read every column's group; None where they are the plain ones, i // group_size."""
        if len(self.refs) < 4:
            return None
        ref = self.refs[3]
        raw = np.empty(ref.n_bytes, np.uint8)
        checkpoint.read_into(ref, 0, raw.data)
        group_of = raw.view(np.int32)
        n_groups = self.n_per_row // self.group_size
        wrong = (group_of < 0) | (group_of >= n_groups)
        if wrong.any():
            at = int(wrong.argmax())
            raise CheckpointError(
                f"{ref} at [{at}]", got=group_of[at], expected=f"a group from 0 to {n_groups - 1}", fix=FETCH_AGAIN
            )
        plain = np.arange(self.n_per_row, dtype=np.int32) // self.group_size
        return None if np.array_equal(group_of, plain) else group_of


def columns(checkpoint: Checkpoint, ref: TensorRef, first: int, count: int) -> Bytes:
    """Read columns [first, first + count) of a stored matrix: the bytes of [n_rows, count].

    Whole rows are read, a block at a time, and the rest thrown away: on a cold disk that is several times faster than
    one small read per row (the next columns then come from the system's cache), and warm it is as fast.
    """
    n_rows, n_columns = ref.shape
    row = ref.n_bytes // n_rows
    item = row // n_columns
    result = np.empty((n_rows, count * item), np.uint8)
    n_block = max(1, BLOCK_BYTES // row)
    block = np.empty((min(n_block, n_rows), row), np.uint8)
    for begin in range(0, n_rows, n_block):
        some = block[: min(n_block, n_rows - begin)]
        checkpoint.read_into(ref, begin * row, some.reshape(-1).data)
        result[begin : begin + len(some)] = some[:, first * item : (first + count) * item]
    return result


def check_scales(ref: TensorRef, scales: Floats, first: int = 0) -> None:
    """Raise CheckpointError where a scale is negative or no number, by place; the columns given start at `first`."""
    right = np.isfinite(scales) & (scales >= 0)
    if right.all():
        return
    at = np.unravel_index(int(right.argmin()), scales.shape)
    place = [int(n) for n in at]
    if place:
        place[-1] += first
    raise CheckpointError(
        f"{ref} at {place}" if place else f"{ref}",
        got=f"the scale {scales[at]:g}",
        expected="a finite number that is not negative",
        fix=FETCH_AGAIN,
    )


def read_group_size(settings: Config, *keys: str) -> int:
    """Read the group size in columns: -1, or at least 1."""
    size = settings.integer(*keys, minimum=-1)
    return size if size == -1 else settings.integer(*keys)


def gather_groups(tensors: Mapping[str, TensorRef], build: Callable[[str, Members], Source]) -> Gathered:
    """Group X.qweight, X.qzeros, X.scales and X.g_idx to the source X.weight that `build` makes of them.

    Raises CheckpointError for a group with a member too few, or stored in two forms.
    """
    groups: dict[str, dict[str, TensorRef]] = {}
    sources: dict[str, Source] = {}
    for name, ref in tensors.items():
        base, _, suffix = name.rpartition(".")
        if base and (suffix in REQUIRED or suffix == OPTIONAL):
            groups.setdefault(base, {})[suffix] = ref
        else:
            sources[name] = Plain(name, ref.shape, (ref,))
    for base, members in groups.items():
        for suffix in REQUIRED:
            if suffix not in members:
                there = " and ".join(str(ref) for ref in members.values())
                raise CheckpointError(f"missing tensor {base}.{suffix}", got=there, fix="download the whole repository")
        name = f"{base}.weight"
        if name in sources:
            raise CheckpointError(f"{sources[name]}", got=f"{members['qweight']} too", expected="one of them")
        sources[name] = build(name, members)
    return sources, ()


def check_members(members: Members, n_in: int, n_out: int, per_word: int, group_size: int) -> int:
    """Check types and shapes of the members beside qweight; give the group size in columns, n_in where it is -1.

    per_word: integers in a 32-bit word. Raises CheckpointError naming the tensor.
    """
    qweight, scales = members["qweight"], members["scales"]
    size = n_in if group_size == -1 else group_size
    if n_in % size:
        raise CheckpointError(f"{qweight}: {n_in} columns", expected=f"a multiple of group_size {size}")
    if n_out % per_word:
        raise CheckpointError(
            f"{scales}: {n_out} outputs", expected=f"a multiple of {per_word}, the integers of a word"
        )
    wanted = {
        "qzeros": (n_in // size, n_out // per_word),
        "scales": (n_in // size, n_out),
        OPTIONAL: (n_in,),
    }
    for suffix, shape in wanted.items():
        ref = members.get(suffix)
        if ref is None:
            continue
        if ref.shape != shape:
            raise CheckpointError(f"shape of {ref}", got=list(ref.shape), expected=f"{list(shape)} beside {qweight}")
        check_dtype(ref, *(tuple(DECODE) if suffix == "scales" else ("I32",)))
    return size


def check_dtype(ref: TensorRef, *allowed: str) -> None:
    """Raise CheckpointError where the tensor is of none of these types."""
    if ref.dtype not in allowed:
        raise CheckpointError(f"dtype of {ref}", got=ref.dtype, expected=" or ".join(allowed))


def check_matrix(ref: TensorRef) -> None:
    """Raise CheckpointError where the tensor is no matrix, or an empty one."""
    if len(ref.shape) != 2 or 0 in ref.shape:
        raise CheckpointError(f"shape of {ref}", got=list(ref.shape), expected="a matrix")


def refs_of(members: Members) -> tuple[TensorRef, ...]:
    """Give the members in the order of Grouped.refs."""
    return tuple(members[suffix] for suffix in (*REQUIRED, OPTIONAL) if suffix in members)
