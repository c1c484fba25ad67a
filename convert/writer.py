"""The streaming writer: every slice of weights straight to its place, from several threads, and on after a break.

Memory is a few pieces, whatever the size of a tensor: an expert's slice goes from the checkpoint to its offset in the
stacked tensor. The files have temporary names until all of them are complete and on disk, and a journal beside them
says which pieces are. Bad input leaves nothing; anything else that stops the work leaves what it did.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hymoe import console, sizes
from hymoe.console import Tick, format_bytes
from hymoe.convert.checkpoint import Checkpoint
from hymoe.convert.journal import Identity, Journal, open_journal, sync_folder
from hymoe.convert.pieces import Piece, cut, in_parallel
from hymoe.convert.split import Part
from hymoe.convert.verify import Error, Tally, compare, wrong
from hymoe.convert.weights import ZeroRows, encoded
from hymoe.errors import CheckpointError, ModelFileError, OutputError, SourceError, UnsupportedError

# How much work an unforeseen end can cost. More often is no safer in practice and makes more work of it.
SYNC_SECONDS = 15.0

# Errors after which what was written is worth nothing.
FATAL = (CheckpointError, UnsupportedError, ModelFileError)
GOES_ON = "run the same command again: it continues"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some space, then {GOES_ON}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that you may write to"),
    errno.EFBIG: "the file system or a limit (ulimit -f) allows no larger file; --split-max-size makes smaller ones",
}

_sync = getattr(os, "fdatasync", os.fsync)


@dataclass(frozen=True)
class Output:
    """What to write where. `identity` is all that decides its bytes; `path` names the journal and the whole.

    overwrite: replace what has the parts' names. restart: do not continue an interrupted output, begin again.
    """

    path: Path
    parts: tuple[Part, ...]
    identity: Identity
    overwrite: bool = False
    restart: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.n_bytes for part in self.parts)


def write(output: Output, checkpoint: Checkpoint, tally: Tally | None = None) -> None:
    """Write every part, or what an interrupted run left of it; with a tally, compare what was written, too.

    Raises CheckpointError for weights that mean no number and ModelFileError for a fault that the comparison finds:
    then nothing is left. Raises OutputError where the output exists, belongs to something else or cannot be written,
    SourceError where the input cannot be read: then, and when interrupted, the same call goes on with it.
    """
    names = [part.path.name for part in output.parts]
    with (
        _output_errors(output),
        open_journal(journal_of(output.path), names, output.identity, restart=output.restart) as journal,
        _kept_or_removed(output, journal),
    ):
        if not (journal.complete and all(part.temporary.exists() or part.path.exists() for part in output.parts)):
            _refuse_existing(output)
            with _open_parts(output, journal, checkpoint.extra_disk) as fds:
                _fill(output, checkpoint, journal, fds, tally)
                journal.record_complete()
        publish(output.parts)
        journal.remove()


def journal_of(out: Path) -> Path:
    """Name the journal of an unfinished output."""
    return out.with_name(f"{out.name}.journal")


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


def publish(parts: Sequence[Part]) -> None:
    """Give complete parts their final names: the first one last, since a set without its first part loads nowhere."""
    for part in reversed(parts):
        if part.temporary.exists():
            part.temporary.replace(part.path)
    sync_folder(parts[0].path.parent)


def pieces(parts: Sequence[Part]) -> Iterator[Piece]:
    """Cut the tensors of all parts into pieces, in file order."""
    number = 0
    for i, part in enumerate(parts):
        offset = len(part.head)
        for tensor in part.tensors:
            for piece in cut(tensor, number, i, offset):
                yield piece
                number = piece.number + 1
            offset += sizes.padded(tensor.n_bytes)


# -- the files --------------------------------------------------------------------------------------------------------


@contextmanager
def _output_errors(output: Output) -> Iterator[None]:
    """Turn what the system says about the output into one line. (Errors of the input have been one before.)"""
    try:
        yield
    except OSError as exc:
        fix = REMEDIES.get(exc.errno or 0, GOES_ON)
        raise OutputError(f"{output.path}: {exc.strerror}", fix=fix) from exc


@contextmanager
def _kept_or_removed(output: Output, journal: Journal) -> Iterator[None]:
    """On the way out with an error: remove everything where it is worth nothing, else say how to go on."""
    try:
        yield
    except BaseException as exc:
        if isinstance(exc, FATAL) or not (journal.records or journal.complete):
            for part in output.parts:
                part.temporary.unlink(missing_ok=True)
            journal.remove()
        elif not isinstance(exc, Exception):
            console.warn(f"interrupted; {GOES_ON}")
        raise


def _refuse_existing(output: Output) -> None:
    """Raise OutputError where a part's name is taken. Asked again under the lock: it may have become so meanwhile."""
    taken = next((part.path for part in output.parts if part.path.exists()), None)
    if taken is not None and not output.overwrite:
        raise OutputError(f"{taken} exists", fix="choose another name, or pass --overwrite")


@contextmanager
def _open_parts(output: Output, journal: Journal, extra_disk: int) -> Iterator[tuple[int, ...]]:
    """Open every part under its temporary name, with its head, at its full size; `extra_disk`: bytes others need."""
    if journal.records and not all(_is_begun(part) for part in output.parts):
        console.warn(f"{output.path}.part is not what it was; beginning again")
        journal.clear()
    on_disk = sum(part.temporary.stat().st_blocks * 512 for part in output.parts if journal.records)
    check_disk(output.path, max(0, output.n_bytes - on_disk) + extra_disk)
    if not journal.records:
        journal.begin()
    with ExitStack() as stack:
        fds = []
        for part in output.parts:
            fd = os.open(part.temporary, os.O_RDWR | os.O_CREAT | (0 if journal.records else os.O_TRUNC), 0o666)
            stack.callback(os.close, fd)
            os.truncate(fd, part.n_bytes)
            _write_all(fd, memoryview(part.head), 0)
            fds.append(fd)
        sync_folder(output.path.parent)
        yield tuple(fds)


def _is_begun(part: Part) -> bool:
    return part.temporary.is_file() and part.temporary.stat().st_size == part.n_bytes


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


# -- the work ---------------------------------------------------------------------------------------------------------


def _fill(output: Output, checkpoint: Checkpoint, journal: Journal, fds: tuple[int, ...], tally: Tally | None) -> None:
    """Write every piece that the journal lacks, and sync."""
    everything = list(pieces(output.parts))
    # Pieces of a run that did not verify have no note: with --verify they are done once more.
    records = [(numbers, note) for numbers, note in journal.records if tally is None or note is not None]
    finished = set[int]().union(*(numbers for numbers, _ in records))
    left = [piece for piece in everything if piece.number not in finished]
    total = sum(piece.n_source_bytes for piece in everything)
    begin = total - sum(piece.n_source_bytes for piece in left)
    if finished:
        console.status(f"continuing: {format_bytes(begin)} of {format_bytes(total)} are done")
    if tally is not None:
        tally.take_in(note for _, note in records)
    work = Worker(output.path, checkpoint, fds, ZeroRows(), verify=tally is not None)
    with (
        console.progress(output.path.name, total, done=begin) as tick,
        Ledger(journal, checkpoint, fds, tally, tick) as ledger,
    ):
        in_parallel(checkpoint, left, work, ledger.add, ledger.keep_up)
    work.zeros.warn()


@dataclass(frozen=True)
class Worker:
    """Reads, converts and writes pieces; from any thread."""

    path: Path
    checkpoint: Checkpoint
    fds: tuple[int, ...]
    zeros: ZeroRows
    verify: bool

    def __call__(self, piece: Piece) -> Error | None:
        """Do one piece; with `verify`, read it back and give its error."""
        fd, source = self.fds[piece.file], piece.source
        try:
            self.checkpoint.require(piece)
            importance = piece.tensor.importance_of(piece.index)
            data = encoded(self.checkpoint, source, piece.rows, piece.tensor.qtype, importance, zeros=self.zeros)
            values = source.read(self.checkpoint, piece.rows.start, len(piece.rows)) if self.verify else None
        except OSError as exc:
            raise SourceError(f"{source}: {exc.strerror}", fix=f"when it can be read, {GOES_ON}") from exc
        _write_all(fd, data.data, piece.offset)
        if values is None:
            return None
        written = np.frombuffer(os.pread(fd, len(data), piece.offset), np.uint8)
        finding = compare(values, written, piece.tensor.qtype)
        if finding.fault:
            raise wrong(self.path, piece, finding.fault)
        return finding.error


@dataclass
class Ledger:
    """Finished pieces on their way into the journal: synced every SYNC_SECONDS beside the work, and at the end."""

    journal: Journal
    checkpoint: Checkpoint
    fds: tuple[int, ...]
    tally: Tally | None
    tick: Tick
    _pieces: list[Piece] = field(default_factory=list)
    _errors: Tally = field(default_factory=Tally)
    _last: float = field(default_factory=time.monotonic)
    _running: Future[None] | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def add(self, piece: Piece, error: Error | None) -> None:
        """Take in a piece that is written."""
        self._pieces.append(piece)
        if error is not None:
            self._errors.add(piece.tensor.name, piece.source.format, piece.tensor.qtype, error)
        self.tick(piece.n_source_bytes)

    def keep_up(self) -> None:
        """Begin to sync where it is time to; raise what the last sync raised."""
        if time.monotonic() - self._last < SYNC_SECONDS or (self._running and not self._running.done()):
            return
        self._wait()
        self._last = time.monotonic()
        batch, errors, self._pieces, self._errors = self._pieces, self._errors, [], Tally()
        if batch:
            self._running = self._pool.submit(self._sync, batch, errors)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, _exc: BaseException | None, _tb: object) -> None:
        """Sync what is left; where something went wrong already, as far as it can be done."""
        try:
            if kind is None:
                self._wait()
                self._sync(self._pieces, self._errors)
            elif not issubclass(kind, FATAL):
                with suppress(OSError):
                    self._wait()
                    self._sync(self._pieces, self._errors)
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _sync(self, batch: Sequence[Piece], errors: Tally) -> None:
        """Bring the data to the disk, then say so, then let go of the input."""
        for fd in self.fds:
            _sync(fd)
        if batch:
            self.journal.record((piece.number for piece in batch), errors.note() if self.tally is not None else None)
        if self.tally is not None:
            self.tally.take_in([errors.note()])
        for piece in batch:
            self.checkpoint.finished(piece)
