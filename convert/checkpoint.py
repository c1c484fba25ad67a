"""Checkpoint folders: which tensors there are, where their bytes lie, and reading them.

The only module that knows the safetensors layout: 8 bytes of little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the data. Everything is checked before the first weight is read,
and weights are read with pread, so that memory stays what the caller allocates.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard

from hymoe.convert.config import read_json
from hymoe.errors import CheckpointError, UnsupportedError

# The library's own limit on a header (huggingface/safetensors, tensor.rs, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
FETCH_AGAIN = "download the file again"

# safetensors dtype -> bytes per element
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorRef:
    """One stored tensor: row-major `shape`, and `n_bytes` at byte `offset` of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    def __str__(self) -> str:
        """Name the tensor and its file, as error messages do."""
        return f"{self.name} ({self.file.name})"


@dataclass
class Checkpoint:
    """The tensors of a folder, by name. Use as a context manager: files stay open inside."""

    folder: Path
    tensors: dict[str, TensorRef]
    _fds: dict[Path, int] = field(default_factory=dict)

    def __enter__(self) -> Self:
        for file in {ref.file for ref in self.tensors.values()}:
            self._fds[file] = os.open(file, os.O_RDONLY)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def read_into(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on. Safe from several threads."""
        done = 0
        while done < len(buffer):
            try:
                n = os.preadv(self._fds[ref.file], [buffer[done:]], ref.offset + start + done)
            except OSError as exc:
                raise CheckpointError(f"{ref} cannot be read: {exc.strerror}", fix="is the disk all right?") from exc
            if n == 0:
                raise CheckpointError(f"{ref}: the file ended while it was read", fix=FETCH_AGAIN)
            done += n


def open_checkpoint(folder: Path) -> Checkpoint:
    """List a checkpoint's tensors from its index, or from every *.safetensors file where it has none.

    Raises CheckpointError for a missing or unsafe shard, a corrupt header, or a tensor that is in two files or in
    none; UnsupportedError for PyTorch pickles, which would run code.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return Checkpoint(folder, _from_index(folder, index))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise UnsupportedError(
                f"{folder}: weights",
                got="PyTorch pickle files",
                expected="*.safetensors",
                fix="download the safetensors form: a pickle can run code",
            )
        raise CheckpointError(f"{folder}: weights", got="no *.safetensors file", fix="download the whole repository")
    return Checkpoint(folder, _merge([read_header(file) for file in files]))


def read_header(file: Path) -> dict[str, TensorRef]:
    """Read one safetensors header. Raises CheckpointError naming the file for anything that does not add up."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            n_header = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= n_header <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file.name}: truncated or not safetensors",
                    got=f"a header of {n_header} bytes in a file of {size}",
                    fix=FETCH_AGAIN,
                )
            raw = stream.read(n_header)
    except OSError as exc:
        raise CheckpointError(f"{file}: {exc.strerror}", fix=FETCH_AGAIN) from exc
    refs = dict(_entries(file, raw, 8 + n_header))
    _check_layout(file, refs, 8 + n_header, size)
    return refs


def _from_index(folder: Path, index: Path) -> dict[str, TensorRef]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name}: weight_map", got=type(weight_map).__name__, expected="a JSON object")
    for name, shard in weight_map.items():
        # A plain name only: "../x" or "/x" would read outside the folder. (Links are fine: the hub's cache is links.)
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{index.name}: shard of {name}", got=repr(shard), expected="a file name inside the model folder"
            )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            n_tensors = sum(value == shard for value in weight_map.values())
            raise CheckpointError(
                f"{index.name}: shard {shard} of {n_tensors} tensors is absent", fix=f"download {shard} into {folder}"
            )
    tensors = _merge([read_header(folder / shard) for shard in shards])
    for name, shard in weight_map.items():
        ref = tensors.get(name)
        if ref is None or ref.file.name != shard:
            where = "no shard" if ref is None else ref.file.name
            raise CheckpointError(f"{index.name}: {name}", got=f"found in {where}", expected=f"in {shard}")
    return tensors


def _merge(headers: list[dict[str, TensorRef]]) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for header in headers:
        for name, ref in header.items():
            if name in tensors:
                raise CheckpointError(f"{name}", got=f"stored in {tensors[name].file.name} and {ref.file.name}")
            tensors[name] = ref
    return tensors


def _entries(file: Path, raw: bytes, data_start: int) -> Iterator[tuple[str, TensorRef]]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in pairs:
            if key in entries:
                raise ValueError(f"the key {key!r} is there twice")
            entries[key] = value
        return entries

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file.name}: corrupt safetensors header ({exc})", fix=FETCH_AGAIN) from exc
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, _entry(file, name, entry, data_start)


def _entry(file: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    def bad(got: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{file.name}: header entry {name}", got=got, expected=expected, fix=FETCH_AGAIN)

    if not isinstance(entry, dict):
        raise bad(type(entry).__name__, "a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise bad(f"dtype {dtype!r}", f"one of {' '.join(DTYPE_BYTES)}")
    if not _is_naturals(shape):
        raise bad(f"shape {shape!r}", "a list of sizes")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {offsets!r}", "[begin, end]")
    n_bytes = offsets[1] - offsets[0]
    if n_bytes != prod(shape) * DTYPE_BYTES[dtype]:
        raise bad(f"{n_bytes} bytes", f"{prod(shape) * DTYPE_BYTES[dtype]} for {dtype} {shape}")
    return TensorRef(name, file, dtype, tuple(shape), data_start + offsets[0], n_bytes)


def _is_naturals(value: object) -> TypeGuard[list[int]]:
    """Say whether `value` is a list of sizes that a file system could hold."""
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value
    )


def _check_layout(file: Path, refs: dict[str, TensorRef], data_start: int, size: int) -> None:
    """Tensors must tile the data section without gaps or overlaps, as the format demands."""
    end = data_start
    for ref in sorted(refs.values(), key=lambda ref: (ref.offset, ref.n_bytes)):
        if ref.offset != end:
            kind = "overlaps the one before it" if ref.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{ref}: corrupt header: the tensor {kind}", fix=FETCH_AGAIN)
        end += ref.n_bytes
    if end != size:
        kind = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{file.name}: {kind}", got=f"{size} bytes", expected=f"{end}", fix=FETCH_AGAIN)
