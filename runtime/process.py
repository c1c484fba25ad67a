"""A child process that cannot outlive us, its log, and who owns a port.

On Linux the kernel kills the child when the thread that started it ends, however it ends (`kill -9` included).
Elsewhere it is stopped on every exit that Python sees: normal ends, errors, Ctrl-C, SIGTERM and SIGHUP.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO, NoReturn, Self

from hymoe.errors import OutputError, ServerError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SECONDS = 10.0
TAIL_BYTES = 8192
WAKE_SECONDS = 0.5


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived; as an exception it unwinds what must be cleaned up. `code` is 128 + the signal."""


def spawn(command: Sequence[str], env: Mapping[str, str], log: BinaryIO) -> subprocess.Popen[bytes]:
    """Start `command` with both outputs in `log`; call it from a thread that lives as long as the child should.

    The child gets a session of its own: Ctrl-C in the terminal reaches us alone, and we stop it in order.
    """
    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_death_signal() if sys.platform == "linux" else None,  # noqa: PLW1509 - only system calls in it
    )


def _death_signal() -> Callable[[], None]:
    # Looked up before the fork: in the child only system calls are safe.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent, refused, kill = os.getpid(), os._exit, ctypes.c_ulong(signal.SIGKILL)

    def die_with_parent() -> None:
        # A parent that died before the call sends nothing: its child already has another parent.
        if prctl(PR_SET_PDEATHSIG, kill) != 0 or os.getppid() != parent:
            refused(127)

    return die_with_parent


def stop(process: subprocess.Popen[bytes], seconds: float = STOP_SECONDS) -> int:
    """Ask the child to end, make it end after `seconds` or at a second signal to us, and give its return code."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def shell_status(returncode: int) -> int:
    """Give the exit status a shell would show: 128 + n for a child that died of signal n."""
    return 128 - returncode if returncode < 0 else returncode


def describe(returncode: int) -> str:
    """Say how a child ended: "exit status 1", "killed by SIGKILL"."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Terminated` inside the block; only the main thread can, others pass through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # nohup ignores SIGHUP on purpose: keep what is ignored.
    before = {number: signal.getsignal(number) for number in wanted if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, _raise_terminated)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def waking() -> Iterator[None]:
    """Let signals end a wait for input inside the block, also one that comes just before the wait begins.

    input() blocks in C. A handler whose signal came a moment too early runs at the next key only, so something has to
    wake it now and then.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, WAKE_SECONDS, WAKE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _raise_terminated(number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated(128 + number)


class Log:
    """What the child writes: a file of the user's choice, or one without a name that leaves nothing behind."""

    def __init__(self, path: Path | None) -> None:
        try:
            self.file: BinaryIO = path.open("a+b") if path else tempfile.TemporaryFile()  # noqa: SIM115
        except OSError as exc:
            raise OutputError(f"{path or 'temporary file'}: cannot write the log", got=exc.strerror or exc) from exc
        self._begin = self._read = self._size()
        self._rest = b""

    def new_lines(self) -> list[str]:
        """Give the complete lines written since the last call."""
        chunk = os.pread(self.file.fileno(), max(self._size() - self._read, 0), self._read)
        self._read += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]

    def tail(self, n_lines: int) -> list[str]:
        """Give the last lines that are not blank."""
        size = self._size()
        start = max(self._begin, size - TAIL_BYTES)
        text = os.pread(self.file.fileno(), size - start, start).decode("utf-8", "replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-n_lines:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _size(self) -> int:
        return os.fstat(self.file.fileno()).st_size


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. Raises ServerError for an address that this machine cannot listen on."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as exc:
        raise ServerError(
            f"host {host}: {exc.strerror or exc}", fix="give an address of this machine with --host"
        ) from exc
    with socket.socket(family, kind, proto) as probe:
        # As the engine's own socket: connections of a server that just ended do not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except PermissionError as exc:
            raise ServerError(
                f"port {port}: not permitted", expected="1024 or more", fix="give another with --port"
            ) from exc
        except OSError as exc:
            if exc.errno == errno.EADDRNOTAVAIL:
                raise ServerError(
                    f"host {host}: no address of this machine", fix="leave out --host, or give 0.0.0.0 for all"
                ) from exc
            return False
    return True


def free_port(host: str) -> int:
    """Give a port that is free now; somebody else may still take it first."""
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def owns_port(pid: int, port: int) -> bool:
    """Whether process `pid` listens on `port`: a stranger who took it first may answer there too.

    Known on Linux, from /proc; elsewhere, and where /proc does not tell, it is taken to be so.
    """
    try:
        links = {link for entry in os.scandir(f"/proc/{pid}/fd") if (link := _link(entry.path))}
        tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
        rows = [row.split() for table in tables if table.exists() for row in table.read_text().splitlines()[1:]]
    except OSError:
        return True
    # Columns: sl, local address:port (hexadecimal), remote, state (0A is LISTEN), …, inode as the tenth.
    inodes = {row[9] for row in rows if row[3] == "0A" and int(row[1].rsplit(":", 1)[1], 16) == port}
    return any(f"socket:[{inode}]" in links for inode in inodes)


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:  # closed since it was listed
        return None
