"""The streaming GGUF writer: header by gguf-py, then every slice of weights straight to its place.

Memory is a few chunks, whatever the size of a tensor: an expert's slice goes from the checkpoint to its offset in the
stacked tensor. The file has a temporary name until it is complete and on disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from hymoe import sizes
from hymoe.console import Tick, format_bytes
from hymoe.convert.architectures import Key
from hymoe.convert.checkpoint import Checkpoint, TensorRef
from hymoe.convert.plan import Plan
from hymoe.convert.weights import encoder
from hymoe.errors import OutputError

# Small enough to stay in a core's cache between read and write, large enough that calls cost nothing.
CHUNK_BYTES = 1 << 20
MAX_WORKERS = 4


@dataclass(frozen=True)
class Chunk:
    """Whole rows of one source tensor: its bytes [start, start + n_bytes) become the output's from `target` on."""

    ref: TensorRef
    start: int
    n_bytes: int
    target: int
    qtype: GGMLQuantizationType
    n_per_row: int


def write_gguf(path: Path, checkpoint: Checkpoint, plan: Plan, *, arch: str, keys: Iterable[Key], tick: Tick) -> int:
    """Write the plan's GGUF to `path` and give its size in bytes; `tick` hears source bytes as they are consumed.

    Raises OutputError where the disk is too small or fails. Whatever is raised, no file is left under either name.
    """
    with _temporary(path) as (part, fd):
        data_start = _write_head(part, plan, arch, keys)
        total = data_start + plan.data_bytes
        check_disk(path, total - data_start)
        os.truncate(fd, total)
        with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
            _run(pool, fd, checkpoint, chunks(plan, data_start), tick)
    return total


def check_disk(path: Path, need: int) -> None:
    """Raise OutputError where the disk of `path` has less than `need` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise OutputError(
            f"{path.parent}: disk too small",
            got=f"{format_bytes(free)} free",
            expected=format_bytes(need),
            fix="free some or choose another folder",
        )


def chunks(plan: Plan, data_start: int) -> Iterator[Chunk]:
    """Cut the plan's tensors into chunks of about CHUNK_BYTES of source, in file order."""
    offset = data_start
    for tensor in plan.tensors:
        n_per_row = tensor.shape[-1]
        row_out = sizes.row_bytes(n_per_row, tensor.qtype)
        target = offset
        for ref in tensor.sources:
            row_in = n_per_row * ref.n_bytes // max(1, _n_elements(ref.shape))
            step = max(1, CHUNK_BYTES // row_in) * row_in
            for start in range(0, ref.n_bytes, step):
                n_bytes = min(step, ref.n_bytes - start)
                yield Chunk(ref, start, n_bytes, target, tensor.qtype, n_per_row)
                target += n_bytes // row_in * row_out
        offset += sizes.padded(tensor.n_bytes)


def _n_elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, int]]:
    """Hold `path`.part open and locked; rename it to `path` at the end, or remove it if anything was raised."""
    part = path.with_name(path.name + ".part")
    with _disk_errors(path):
        fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have renamed the file since it was opened here: then it is finished work.
            if not os.path.samestat(os.fstat(fd), part.stat()):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):
            raise OutputError(
                f"{part}: another hy-convert is writing it", fix="wait for it, or choose another name"
            ) from None
        try:
            with _disk_errors(path):
                os.truncate(fd, 0)
                yield part, fd
                os.fsync(fd)
                part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    finally:
        os.close(fd)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        fix = (
            "free some space and run it again"
            if exc.errno in (errno.ENOSPC, errno.EDQUOT)
            else "is the folder writable?"
        )
        raise OutputError(f"{path}: {exc.strerror}", fix=fix) from exc


def _write_head(part: Path, plan: Plan, arch: str, keys: Iterable[Key]) -> int:
    """Write header, metadata and tensor table; give the offset where the data section starts."""
    writer = GGUFWriter(part, arch)
    for key in keys:
        writer.add_key_value(key.key, key.value, GGUFValueType[key.kind])
    for tensor in plan.tensors:
        # The numpy dtype is only consulted where raw_dtype is absent.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return sizes.padded(part.stat().st_size)


def _run(pool: ThreadPoolExecutor, fd: int, checkpoint: Checkpoint, todo: Iterator[Chunk], tick: Tick) -> None:
    """Keep every worker busy with a bounded number of chunks in flight; stop at the first error."""
    buffers = threading.local()
    in_flight = {pool.submit(_copy, chunk, fd, checkpoint, buffers) for chunk in islice(todo, 2 * MAX_WORKERS)}
    try:
        while in_flight:
            done, in_flight = wait(in_flight, return_when=FIRST_COMPLETED)
            for future in done:
                tick(future.result())
            in_flight |= {pool.submit(_copy, chunk, fd, checkpoint, buffers) for chunk in islice(todo, len(done))}
    except BaseException:
        _cancel(in_flight)
        raise


def _cancel(futures: Iterable[Future[int]]) -> None:
    for future in futures:
        future.cancel()


def _copy(chunk: Chunk, fd: int, checkpoint: Checkpoint, buffers: threading.local) -> int:
    """Read, convert and write one chunk; gives its number of source bytes."""
    if not hasattr(buffers, "raw") or buffers.raw.size < chunk.n_bytes:
        buffers.raw = np.empty(max(CHUNK_BYTES, chunk.n_bytes), np.uint8)
    raw = buffers.raw[: chunk.n_bytes]
    checkpoint.read_into(chunk.ref, chunk.start, memoryview(raw))
    view = encoder(chunk.ref, chunk.qtype, chunk.n_per_row)(raw).data.cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], chunk.target + done)
    return chunk.n_bytes
