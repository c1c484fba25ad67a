"""A child process that cannot outlive us, its log, and who owns a port.

On Linux the kernel kills the child when the thread that started it ends, however it ends (`kill -9` included).
Elsewhere it is stopped on every exit that Python sees: normal ends, errors, Ctrl-C, SIGTERM and SIGHUP.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO, NoReturn, Self

from hymoe.errors import OutputError, ServerError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SECONDS = 10.0
TAIL_BYTES = 8192
WAKE_SECONDS = 0.5
LOG_BYTES = 4 << 20  # of a log without a name
LOG_COPY = ".1"  # what a named log's name gets when it starts over


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
        preexec_fn=death_signal(),  # noqa: PLW1509 - only system calls in it
    )


def death_signal() -> Callable[[], None] | None:
    """Give what a child calls first so that the kernel kills it when this thread ends; None where no kernel does."""
    if sys.platform != "linux":
        return None
    # Looked up before the fork: in the child only system calls are safe.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent, refused, kill = os.getpid(), os._exit, ctypes.c_ulong(signal.SIGKILL)

    def die_with_parent() -> None:
        # A parent that died before the call sends nothing: its child already has another parent.
        if prctl(PR_SET_PDEATHSIG, kill) != 0 or os.getppid() != parent:
            refused(127)

    return die_with_parent


def stop(process: subprocess.Popen[bytes], seconds: float = STOP_SECONDS, how: signal.Signals = signal.SIGTERM) -> int:
    """Ask the child to end, make it end after `seconds` or at a second signal to us, and give its return code."""
    if process.poll() is None:
        process.send_signal(how)
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
    """What the child writes: a file of the user's choice, or one without a name that leaves nothing behind.

    The latter starts over when `new_lines` has read more than LOG_BYTES of it; so does a named one beyond `limit`
    bytes, and what it held is then in a file beside it (`.1`). Raises OutputError where nothing can be written.
    """

    def __init__(self, path: Path | None, limit: int | None = None) -> None:
        self._path = path
        self._limit = LOG_BYTES if path is None else limit
        try:
            self.file = _begun(path) if path else _unnamed()
        except OSError as exc:
            raise OutputError(f"{path or 'temporary file'}: cannot write the log", got=exc.strerror or exc) from exc
        self._begin = self._read = self._size()
        self._rest = self._before = b""

    def new_lines(self) -> list[str]:
        """Give the complete lines written since the last call."""
        chunk = os.pread(self.file.fileno(), max(self._size() - self._read, 0), self._read)
        self._read += len(chunk)
        if self._limit is not None and self._read > self._limit:
            # What the child writes between the two calls is lost: a few lines in millions.
            self._before = self._end()
            self._keep_a_copy()
            os.ftruncate(self.file.fileno(), 0)
            self._begin = self._read = 0
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]

    def tail(self, n_lines: int) -> list[str]:
        """Give the last lines that are not blank."""
        text = self._end().decode("utf-8", "replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-n_lines:]

    def is_full(self) -> bool:
        """Whether the disk has no room for more."""
        disk = os.fstatvfs(self.file.fileno())
        return disk.f_blocks > 0 and disk.f_bavail == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _keep_a_copy(self) -> None:
        if self._path is not None:
            with suppress(OSError):  # a full disk must not end the server
                shutil.copyfile(self._path, self._path.with_name(self._path.name + LOG_COPY))

    def _size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def _end(self) -> bytes:
        size = self._size()
        start = max(self._begin, size - TAIL_BYTES)
        return (self._before + os.pread(self.file.fileno(), size - start, start))[-TAIL_BYTES:]


def _begun(path: Path) -> BinaryIO:
    with ExitStack() as undo:
        file: BinaryIO = undo.enter_context(path.open("a+b"))
        # It tells runs apart, and a full disk shows at the first byte.
        os.write(file.fileno(), time.strftime("--- %Y-%m-%dT%H:%M:%SZ\n", time.gmtime()).encode())
        undo.pop_all()
        return file


def _unnamed() -> BinaryIO:
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - its log closes it
    # Who appends writes at the new end after a truncation, and not where it was.
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
    return file


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. Raises ServerError for an address that this machine cannot listen on."""
    probe = _listen(host, port)
    if probe is not None:
        probe.close()
    return probe is not None


def free_port(host: str) -> int:
    """Give a port that is free now; somebody else may still take it first. Raises ServerError as `port_is_free`."""
    probe = _listen(host, 0)
    if probe is None:
        raise ServerError(f"host {host}: no free port", fix="give one with --port")
    with probe:
        port: int = probe.getsockname()[1]
        return port


def _listen(host: str, port: int) -> socket.socket | None:
    """Listen there; None where that cannot be now."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as exc:
        # UnicodeError: what no name server need be asked about, "a..b".
        reason = (exc.strerror or exc) if isinstance(exc, OSError) else "no name of a host"
        raise ServerError(f"host {host}: {reason}", fix="give an address of this machine with --host") from exc
    try:
        with ExitStack() as undo:
            probe = undo.enter_context(socket.socket(family, kind, proto))
            # As the engine's own socket: connections of a server that just ended do not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            undo.pop_all()
            return probe
    except PermissionError as exc:
        raise ServerError(
            f"port {port}: not permitted", expected="1024 or more", fix="give another with --port"
        ) from exc
    except OSError as exc:
        if exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise ServerError(
                f"host {host}: no address of this machine", fix="leave out --host, or give 0.0.0.0 for all"
            ) from exc
        return None


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
