"""What of an unfinished output is on disk already, kept beside it so that the same command can go on.

OUT.gguf.journal is text, one record a line, each behind the CRC-32 of itself and of the head:

    {"files": […], "identity": {…}}             the head: the names of the parts, and all that decides their bytes
    {"pieces": [[first, end], …], "note": …}    these pieces (numbers, end excluded) have reached the disk
    {"complete": true}                          everything has; the parts are about to get their final names

A record is written after the data it speaks of were synced, and synced itself, so the journal never claims more than
the disk holds. A line that does not add up (the last one, when the power went) ends the journal. Who holds the file's
lock is the one process that writes the output.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from hymoe.errors import OutputError

# What decides the bytes of the output, in groups ("option", "input", …) of named values.
Identity = Mapping[str, Mapping[str, str]]

DIFFERENCES = {
    "option": "was begun with another {name}",
    "input": "was begun from another state of {name}",
    "metadata": "was begun with another value of {name}",
    "tensor": "was begun with another layout of {name}",
}
RESTART = "pass --restart to begin again"


@dataclass
class Journal:
    """An open, locked journal. `records` are pieces that are done, and what was noted with them."""

    path: Path
    fd: int
    head: dict[str, Any]
    records: list[tuple[set[int], Any]] = field(default_factory=list)
    complete: bool = False
    _seed: int = 0

    @property
    def pieces(self) -> set[int]:
        """All pieces that are done."""
        return set[int]().union(*(pieces for pieces, _ in self.records))

    def record(self, pieces: Iterable[int], note: Any = None) -> None:
        """Add pieces whose data are synced already."""
        done = sorted(pieces)
        self._append({"pieces": _ranges(done), "note": note})
        self.records.append((set(done), note))

    def record_complete(self) -> None:
        """Say that all data are synced and that the parts are about to be renamed."""
        self._append({"complete": True})
        self.complete = True

    def begin(self) -> None:
        """Write the head: from here on the parts' temporary files may exist, with nothing in them yet."""
        self.clear()
        self._append(self.head)
        self._seed = crc32(_text(self.head))

    def clear(self) -> None:
        """Forget everything, on disk first: what it claims may be overwritten next."""
        os.ftruncate(self.fd, 0)
        os.fsync(self.fd)
        self.records, self.complete, self._seed = [], False, 0

    def remove(self) -> None:
        """Delete it: the output is complete, or nothing of it is left."""
        self.path.unlink(missing_ok=True)

    def _append(self, record: Mapping[str, Any]) -> None:
        text = _text(record)
        line = b"%08x %s\n" % (crc32(text, self._seed), text)
        end = os.fstat(self.fd).st_size
        try:
            if os.write(self.fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.fd)
        except OSError:
            os.ftruncate(self.fd, end)  # nothing after a torn line would be read
            raise


@contextmanager
def open_journal(path: Path, files: Sequence[str], identity: Identity, *, restart: bool) -> Iterator[Journal]:
    """Open and lock the journal at `path` and read it; without pieces nothing is there that could be used.

    files: names of the parts. restart: forget what is there, temporary files included.
    Raises OutputError where another process holds it, or where it was begun for an output with other bytes.
    """
    fd = _locked(path)
    try:
        journal = Journal(path, fd, {"files": list(files), "identity": {k: dict(v) for k, v in identity.items()}})
        head = _read(journal)
        if head is not None and (restart or not (journal.records or journal.complete)):
            journal.clear()
            _forget(path, head)
        elif head is not None:
            _compare(path, head, journal.head)
        yield journal
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make names that were added or changed in `folder` outlive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _locked(path: Path) -> int:
    """Open the journal for appending and lock it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have finished and removed the file between our open and our lock.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
        except BlockingIOError:
            os.close(fd)
            raise OutputError(
                f"{path.with_suffix('')}: another hy-convert is writing it", fix="wait for it, or choose another name"
            ) from None
        os.close(fd)


def _read(journal: Journal) -> dict[str, Any] | None:
    """Take in every record that adds up and cut off the rest; gives the head, or None where there is none."""
    raw = os.pread(journal.fd, os.fstat(journal.fd).st_size, 0)
    head: dict[str, Any] | None = None
    end = seed = 0
    for line in raw.splitlines(keepends=True):
        text = line[9:-1]
        if not line.endswith(b"\n") or line[:9] != b"%08x " % crc32(text, seed):
            break
        record = json.loads(text)
        if head is None:
            head, seed = record, crc32(text)
        elif "complete" in record:
            journal.complete = True
        else:
            pieces = {piece for first, stop in record["pieces"] for piece in range(first, stop)}
            journal.records.append((pieces, record["note"]))
        end += len(line)
    os.ftruncate(journal.fd, end)
    journal._seed = seed
    return head


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise OutputError naming the first thing in which an interrupted output differs from the one wanted."""
    out = path.with_suffix("")
    for group, text in DIFFERENCES.items():
        old, new = found["identity"].get(group, {}), wanted["identity"].get(group, {})
        for name in [*new, *(name for name in old if name not in new)]:
            if old.get(name) != new.get(name):
                shown = {"got": new.get(name, "none"), "expected": old.get(name, "none")} if group == "option" else {}
                raise OutputError(f"{out}.part {text.format(name=name)}", **shown, fix=f"undo the change, or {RESTART}")
    if found != wanted:
        raise OutputError(f"{out}.part was begun with other parts", fix=RESTART)


def _forget(path: Path, head: Mapping[str, Any]) -> None:
    """Delete the temporary files that a journal speaks of."""
    for name in head["files"]:
        if Path(name).name == name:
            path.with_name(f"{name}.part").unlink(missing_ok=True)


def _text(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Give ascending numbers as ranges [first, end)."""
    if not numbers:
        return []
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    return [(numbers[i], numbers[j - 1] + 1) for i, j in pairwise([0, *breaks, len(numbers)])]
