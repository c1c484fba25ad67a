"""hy-convert in a process of its own, with small pieces and at a measured pace, so that it can be interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# argv: options as JSON, then hy-convert's own. The real program, but for sizes and pace:
#   piece, sync   bytes of a piece as float32, seconds between syncs
#   pace          seconds that every write takes at least
#   durable       file that gets a copy of what each sync has made durable, and nothing else
#   full_disk     leave out the look at the free space, so that the disk gets full in the middle
#   broken_read   number of the read that fails as a broken disk's do
#   flip          number of the write in which one bit is changed
PROGRAM = """
import errno, itertools, json, os, shutil, sys, time
from hymoe.convert import checkpoint, pieces, writer
options = json.loads(sys.argv[1])
pieces.PIECE_BYTES, writer.SYNC_SECONDS = options["piece"], options["sync"]
write_all, sync, read_into = writer._write_all, writer._sync, checkpoint.Checkpoint.read_into
writes, reads = itertools.count(), itertools.count()

def paced(fd, view, offset):
    time.sleep(options["pace"])
    if next(writes) == options["flip"]:
        view = bytearray(view)
        view[len(view) // 2] ^= 1
    write_all(fd, memoryview(view), offset)

def synced(fd):
    image = options["durable"] + ".new"
    shutil.copyfile(f"/proc/self/fd/{fd}", image)
    sync(fd)
    os.replace(image, options["durable"])

def broken(self, ref, start, buffer):
    if next(reads) == options["broken_read"]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    read_into(self, ref, start, buffer)

writer._write_all, checkpoint.Checkpoint.read_into = paced, broken
if options["durable"]:
    writer._sync = synced
if options["full_disk"]:
    writer.check_disk = lambda *_: None
from hymoe.convert.cli import main
sys.exit(main(sys.argv[2:]))
"""

DEFAULTS = {
    "piece": 4096,
    "sync": 0.0,
    "pace": 0.0,
    "durable": "",
    "full_disk": False,
    "broken_read": -1,
    "flip": -1,
}


def start(arguments: Sequence[object], **options: object) -> subprocess.Popen[str]:
    """Start a conversion."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(DEFAULTS | options), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def run(arguments: Sequence[object], **options: object) -> tuple[int, str, str]:
    """Run a conversion to its end; gives status, stdout and stderr."""
    process = start(arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def interrupt(
    arguments: Sequence[object], after: float, how: signal.Signals, *, n_records: float = 0, **options: object
) -> tuple[int, str]:
    """Start a conversion and send a signal `after` seconds of writing and so many records; gives status and stderr."""
    process = start(arguments, **options)
    journal = Path(f"{arguments[1]}.journal")
    before = journal.stat().st_mtime_ns if journal.exists() else 0
    while process.poll() is None and not (journal.exists() and journal.stat().st_mtime_ns != before):
        time.sleep(0.002)
    while process.poll() is None and journal.exists() and journal.read_bytes().count(b"\n") < n_records:
        time.sleep(0.002)
    time.sleep(after)
    process.send_signal(how)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def records(out: Path) -> int:
    """Number of whole lines in the journal of an unfinished output: the head and what follows."""
    return Path(f"{out}.journal").read_bytes().count(b"\n")
