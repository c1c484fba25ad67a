"""Programs that tests start directly. They end with the tests, also when those are killed (Linux)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hymoe.runtime.process import death_signal

Stream = int | IO[bytes] | IO[str]


@contextmanager
def child(
    words: Sequence[str | Path],
    *,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = subprocess.DEVNULL,
    stderr: Stream = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Run a program, whose pipes are text, for the length of the block at most."""
    with subprocess.Popen(
        words,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=env,
        text=True,
        preexec_fn=death_signal(),  # noqa: PLW1509 - only system calls in it
    ) as started:
        try:
            yield started
        finally:
            started.kill()
