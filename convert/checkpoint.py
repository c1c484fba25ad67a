"""Checkpoint folders: which tensors there are, where their bytes lie, and reading them.

The only module that knows the safetensors layout: 8 bytes of little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the data. Everything is checked before the first weight is read,
and weights are read with pread, so that memory stays what the caller allocates.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self, TypeGuard, TypeVar

from hymoe.convert.config import parse_json, read_json
from hymoe.errors import CheckpointError, SourceError, UnsupportedError

# The library's own limit on a header (huggingface/safetensors, tensor.rs, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
FETCH_AGAIN = "download the file again"
PICKLES = (".bin", ".pt", ".pth")
FIRST_READ = 128 << 10
HEADERS_AT_ONCE = 8

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


class Stored(Protocol):
    """Anything that is read from stored tensors; a Source is one."""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The stored tensors it is read from."""


StoredT = TypeVar("StoredT", bound=Stored)


@dataclass
class Checkpoint:
    """The tensors of a checkpoint, by name. Use as a context manager: files stay open inside.

    The files may come and go while they are read (a download), so who reads says what it needs: `arrange` once, then
    `require` before and `finished` after each piece. For a folder on disk these cost nothing.
    """

    folder: Path
    tensors: Mapping[str, TensorRef]
    _fds: dict[Path, int] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    @property
    def extra_disk(self) -> int:
        """Bytes of disk that reading takes for a while."""
        return 0

    def arrange(self, pieces: Sequence[StoredT]) -> list[StoredT]:
        """Give the pieces that will be read in the order in which they should be: once, before the first is read."""
        return list(pieces)

    def require(self, piece: Stored) -> None:
        """Return when the piece can be read. Raises a HyError where it never can."""

    def finished(self, piece: Stored) -> None:
        """Say that the piece's values are in the output and will not be read again. Safe from any thread."""

    def stop(self) -> None:
        """Let everyone who waits in `require` go: the work has failed elsewhere. Safe from any thread."""

    def read_into(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on. Safe from several threads."""
        fd = self._open(ref.file)
        done = 0
        while done < len(buffer):
            try:
                n = os.preadv(fd, [buffer[done:]], ref.offset + start + done)
            except OSError as exc:
                raise SourceError(f"{ref} cannot be read: {exc.strerror}", fix="is the disk all right?") from exc
            if n == 0:
                raise CheckpointError(f"{ref}: the file ended while it was read", fix=FETCH_AGAIN)
            done += n

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._fds:
                self._fds[file] = os.open(file, os.O_RDONLY)
            return self._fds[file]

    def _close(self, file: Path) -> None:
        with self._lock:
            fd = self._fds.pop(file, None)
        if fd is not None:
            os.close(fd)


class Files(Protocol):
    """The files of a checkpoint, wherever they are: a folder, or a repository on the hub."""

    @property
    def folder(self) -> Path:
        """Where they are, or will be when they are read."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file, by name."""

    def identity(self, name: str) -> str:
        """Tell a file's content from any other it may have had or get."""

    def read(self, name: str, start: int, count: int) -> bytes:
        """Read at most `count` bytes from byte `start` of a file on. Raises a HyError where it cannot."""

    def checkpoint(self, tensors: Mapping[str, TensorRef]) -> Checkpoint:
        """Give the checkpoint of these tensors."""


@dataclass(frozen=True)
class Folder:
    """Files in a folder on disk."""

    folder: Path

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file, by name."""
        return {file.name: file.stat().st_size for file in self.folder.iterdir() if file.is_file()}

    def identity(self, name: str) -> str:
        """Tell a file's content from any other it may have had: by size and time of its last change."""
        stat = (self.folder / name).stat()
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"

    def read(self, name: str, start: int, count: int) -> bytes:
        """Read at most `count` bytes from byte `start` of a file on. Raises CheckpointError where it cannot."""
        file = self.folder / name
        try:
            with file.open("rb") as stream:
                stream.seek(start)
                return stream.read(count)
        except OSError as exc:
            raise CheckpointError(f"{file}: {exc.strerror}", fix=FETCH_AGAIN) from exc

    def checkpoint(self, tensors: Mapping[str, TensorRef]) -> Checkpoint:
        """Give the checkpoint of these tensors."""
        return Checkpoint(self.folder, tensors)


def open_checkpoint(files: Files) -> Checkpoint:
    """List a checkpoint's tensors from its index, or from every *.safetensors file where it has none.

    Raises CheckpointError for a missing or unsafe shard, a corrupt header, or a tensor that is in two files or in
    none; UnsupportedError for PyTorch pickles, which would run code.
    """
    return files.checkpoint(list_tensors(files))


def list_tensors(files: Files) -> dict[str, TensorRef]:
    """Give every stored tensor by name, from the headers alone. Raises as `open_checkpoint` does."""
    sizes = files.sizes()
    if INDEX_NAME in sizes:
        return _from_index(files, sizes)
    shards = sorted(name for name in sizes if name.endswith(".safetensors"))
    if not shards:
        raise no_weights(files)
    return _merge(_headers(files, shards, sizes))


def no_weights(files: Files) -> CheckpointError | UnsupportedError:
    """Say why a checkpoint without *.safetensors cannot be read."""
    pickles = sorted(name for name in files.sizes() if name.endswith(PICKLES))
    if not pickles:
        return CheckpointError(
            f"{files.folder}: weights", got="no *.safetensors file", fix="download the whole repository"
        )
    return UnsupportedError(
        f"{files.folder}: weights",
        got=f"PyTorch pickle files ({pickles[0]})",
        expected="*.safetensors",
        fix="a pickle can run code: take the safetensors form, or where you trust the file save it again with "
        "save_pretrained of transformers, in an environment of its own",
    )


def read_index(files: Files) -> dict[str, str]:
    """Read the index's weight_map: tensor name -> file name. Raises CheckpointError for anything else in it."""
    weight_map = read_json(files.folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME}: weight_map", got=type(weight_map).__name__, expected="a JSON object")
    for name, shard in weight_map.items():
        # A plain name only: "../x" or "/x" would read outside the folder. (Links are fine: the hub's cache is links.)
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{INDEX_NAME}: shard of {name}", got=repr(shard), expected="a file name inside the model folder"
            )
    return weight_map


def _headers(files: Files, shards: Iterable[str], sizes: Mapping[str, int]) -> list[dict[str, TensorRef]]:
    """Read the shards' headers, several at a time: on the hub each costs a few round trips."""
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        return list(pool.map(lambda name: read_header(files, name, sizes[name]), shards))


def read_header(files: Files, name: str, size: int) -> dict[str, TensorRef]:
    """Read the header of a file of `size` bytes. Raises CheckpointError naming it for anything that does not add up."""
    # One read is enough for nearly every header.
    head = files.read(name, 0, FIRST_READ)
    n_header = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if not 2 <= n_header <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{name}: truncated or not safetensors",
            got=f"a header of {n_header} bytes in a file of {size}",
            fix=FETCH_AGAIN,
        )
    raw = head[8 : 8 + n_header]
    if len(raw) < n_header:
        raw += files.read(name, 8 + len(raw), n_header - len(raw))
    file = files.folder / name
    refs = dict(_entries(file, raw, 8 + n_header))
    _check_layout(file, refs, 8 + n_header, size)
    return refs


def _from_index(files: Files, sizes: Mapping[str, int]) -> dict[str, TensorRef]:
    weight_map = read_index(files)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard not in sizes:
            n_tensors = sum(value == shard for value in weight_map.values())
            raise CheckpointError(
                f"{INDEX_NAME}: shard {shard} of {n_tensors} tensors is absent",
                fix=f"download {shard} into {files.folder}",
            )
    tensors = _merge(_headers(files, shards, sizes))
    for name, shard in weight_map.items():
        ref = tensors.get(name)
        if ref is None or ref.file.name != shard:
            where = "no shard" if ref is None else ref.file.name
            raise CheckpointError(f"{INDEX_NAME}: {name}", got=f"found in {where}", expected=f"in {shard}")
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
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} is there twice")
            found[key] = value
        return found

    try:
        header = parse_json(raw, no_duplicates)
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
