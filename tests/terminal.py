"""Run a command on a terminal of its own (a pty) and see the screen; or with plain pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from children import child

from hymoe.runtime.process import death_signal

TIMEOUT = 120.0  # against hanging; says nothing about speed


def command(name: str, *arguments: object) -> list[str]:
    """The installed script `name`, run with this Python."""
    return [sys.executable, str(Path(sys.executable).with_name(name)), *map(str, arguments)]


def run(
    words: list[str], *, stdin: bytes | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end without a terminal; the streams come as text."""
    done = subprocess.run(
        words,
        input=stdin or b"",
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
        env={**os.environ, **(env or {})},
        preexec_fn=death_signal(),
    )
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


class Terminal:
    """A command on a terminal; `screen` is all it has shown, \\r\\n as \\n."""

    def __init__(self, words: list[str], *, env: Mapping[str, str] | None = None) -> None:
        die_with_tests = death_signal()
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            if die_with_tests:
                die_with_tests()
            os.environ.update(env or {})
            # 50 lines of 500 columns: no line of a test wraps.
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 500, 0, 0))
            os.execv(words[0], words)
        self._raw = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)

    @property
    def screen(self) -> str:
        """All that was shown so far."""
        return self._raw.decode("utf-8", "replace").replace("\r\n", "\n")

    def expect(self, text: str, *, after: int = 0) -> int:
        """Wait until the screen shows `text` behind position `after`; give the position behind it."""
        deadline = time.monotonic() + TIMEOUT
        while (at := self.screen.find(text, after)) < 0:
            assert self._read(deadline), f"the command ended without {text!r}:\n{self.screen}"
        return at + len(text)

    def read(self) -> None:
        """Wait for something new on the screen."""
        assert self._read(time.monotonic() + TIMEOUT), f"the command ended:\n{self.screen}"

    def type(self, text: str) -> None:
        """Type `text`; "\\x03" is Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self.fd, text.encode())

    def wait(self) -> int:
        """Read to the end and give the exit status."""
        deadline = time.monotonic() + TIMEOUT
        while self._read(deadline):
            pass
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return status

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing new for {TIMEOUT:.0f} s:\n{self.screen}"
        try:
            chunk = os.read(self.fd, 65536)
        except OSError:  # Linux says EIO when the other side is gone
            chunk = b""
        self._raw += chunk
        return bool(chunk)


def engine_of(pid: int, *arguments: str) -> int | None:
    """The process id of the llama-server that `pid` started with these arguments, None where there is none (Linux)."""
    wanted = "\0".join(["", *arguments, ""])
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, name = (folder / "status").read_text(), (folder / "comm").read_text().strip()
            words = (folder / "cmdline").read_text()
        except OSError:
            continue
        if re.search(rf"^PPid:\t{pid}$", status, re.MULTILINE) and name == "llama-server" and wanted in words:
            return int(folder.name)
    return None


def engine_of_killed(code: str, model: Path) -> int:
    """Run Python that serves `model` and prints "up", kill it, and give the process id of its engine."""
    with child([sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        pid = engine_of(parent.pid)
        parent.kill()
    assert pid is not None
    return pid


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie (Linux)."""
    try:
        return not re.search(r"^State:\tZ", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False


def ends(pid: int, seconds: float = TIMEOUT) -> bool:
    """Whether the process is gone before `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)
