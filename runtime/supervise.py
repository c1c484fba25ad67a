"""Keep an engine running: `hy-serve` between its options and its exit status, and `serve` in the background."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from hymoe import console
from hymoe.runtime.endpoint import Endpoint, is_loopback, is_shared
from hymoe.runtime.monitor import Monitor
from hymoe.runtime.placing import place, smaller, summary
from hymoe.runtime.process import Terminated, signals_as_exceptions
from hymoe.runtime.router import mean_experts
from hymoe.runtime.server import DEFAULT_CTX, Server, ServerExitError, ServerOptions, checked_keys
from hymoe.runtime.workers import WorkerError

FIRST_DELAY = 0.5  # seconds before the first restart; each next one waits twice as long
LONGEST_DELAY = 30.0
HEALTHY_SECONDS = 60.0  # of serving, after which a crash counts as the first
FAILED_STARTS = 5  # in a row, after which a restart is given up
DRAIN_SECONDS = 30.0
WATCH_SECONDS = 0.2
LOGS_VARIABLE = "HYMOE_LOGS"
LOG_LIMIT = 16 << 20  # bytes of a log that nobody named


@dataclass
class Backoff:
    """How long to wait before the next restart, from what became of the ones before."""

    delay: float = FIRST_DELAY
    failed: int = 0  # starts in a row that never served

    def after(self, served_seconds: float | None) -> float | None:
        """Give the seconds to wait after an engine that served so long (None: never); None to give up."""
        self.failed = self.failed + 1 if served_seconds is None else 0
        if self.failed >= FAILED_STARTS:
            return None
        if served_seconds is not None and served_seconds >= HEALTHY_SECONDS:
            self.delay = FIRST_DELAY
        delay, self.delay = self.delay, min(2 * self.delay, LONGEST_DELAY)
        return delay


class Supervisor:
    """One engine at a time on one port: the next is started when it crashes.

    watch: is given a healthy server and looks after it until it ends, which raises. pause: waits that many seconds.
    """

    def __init__(
        self, options: ServerOptions, watch: Callable[[Server], object], pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._options = options
        self._watch = watch
        self._pause = pause
        self._backoff = Backoff()
        self._has_served = False
        self._is_smaller = False  # a plan is stepped down once

    def run(self) -> NoReturn:
        """Serve until something raised ends it: ServerExitError where the engine is given up or ended in order."""
        while True:
            begun: float | None = None
            try:
                with Server(self._options, self._pause) as server:
                    begun = time.monotonic()
                    self._options = replace(self._options, port=server.port)
                    self._has_served = True
                    self._watch(server)
            except ServerExitError as exc:
                self._recover(exc, None if begun is None else time.monotonic() - begun)
            except WorkerError as exc:
                self._await_worker(exc)

    def _recover(self, exc: ServerExitError, served_seconds: float | None) -> None:
        """Prepare the next start, or raise `exc` where there is none."""
        if (found := self._smaller(exc)) and found.plan:
            console.warn(f"{exc}; once more with less: {summary(found.plan)}")
            self._options, self._is_smaller = found, True
            return
        # Whoever asked the engine itself to end, with status 0, meant it.
        if not self._has_served or exc.status == 0:
            raise exc
        delay = self._backoff.after(served_seconds)
        if delay is None:
            console.warn(f"given up after {FAILED_STARTS} starts in a row that failed")
            raise exc
        console.warn(f"{exc}; starting it again in {delay:g} s")
        self._pause(delay)

    def _smaller(self, exc: ServerExitError) -> ServerOptions | None:
        return smaller(self._options, exc.complaints) if exc.out_of_memory and not self._is_smaller else None

    def _await_worker(self, exc: WorkerError) -> None:
        """Wait a while for a machine that is away; raises `exc` where it has never been there."""
        if not self._has_served:
            raise exc
        delay = self._backoff.after(0.0) or LONGEST_DELAY
        console.warn(f"{exc}; trying again in {delay:g} s")
        self._pause(delay)


def supervise(options: ServerOptions, drain: float = DRAIN_SECONDS) -> int:
    """Serve until a signal or the engine's own end; give the exit status.

    Ctrl-C, SIGTERM and SIGHUP let a healthy engine finish what it answers, for `drain` seconds at most, and give 0; a
    second one, and one before it is healthy, gives 128 + the signal. An engine that ends in order by itself passes on
    its status, one that crashes is started again. The model goes where a plan says, unless `options` place it.
    Raises as `Server` and `place` do.
    """
    # before the plan, which takes seconds
    checked_keys(options)
    _warn_of_shared_keys(options.api_key_file)
    with signals_as_exceptions():
        try:
            return _Foreground(place(options), drain).run()
        except ServerExitError as exc:
            show_exit(exc)
            return exc.status


def default_log(port: int) -> Path | None:
    """Give the log of a server on this port, in the folder that HYMOE_LOGS names or the user's folder of logs.

    None, and then a log without a name, for port 0 and where the folder cannot be written.
    """
    import platformdirs

    if not port:
        return None
    given = os.environ.get(LOGS_VARIABLE)
    folder = Path(given).expanduser() if given else Path(platformdirs.user_log_dir("hymoe", appauthor=False))
    file = folder.absolute() / f"serve-{port}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
    except OSError as exc:
        console.warn(f"{file}: the engine's log cannot be kept there: {exc.strerror or exc}; --log FILE keeps it")
        return None
    return file


def show_exit(exc: ServerExitError) -> None:
    """Show how the engine ended, after the last lines of its log (which -v has shown already)."""
    for line in exc.tail if not console.is_verbose() else []:
        console.status(f"  | {line}")
    console.error(str(exc))


@contextmanager
def background(options: ServerOptions) -> Iterator[Endpoint]:
    """Keep an engine running on a thread of its own, for the length of the block; it begins when the engine is healthy.

    Raises as `Server` does, and at the end of the block where the engine had to be given up.
    """
    thread = _Background(options)
    thread.start()
    try:
        yield thread.endpoint()
    finally:
        thread.stop()
    if thread.failure is not None:
        raise thread.failure


class _Foreground:
    """hy-serve's way: status lines, and signals that arrive as exceptions."""

    def __init__(self, options: ServerOptions, drain: float) -> None:
        self._options = options
        self._drain = drain
        self._starts = 0

    def run(self) -> int:
        log = f" (the engine's log: {self._options.log})" if self._options.log else ""
        console.status(f"loading {self._options.model}{log}")
        if self._options.plan is not None:
            console.status(summary(self._options.plan))
        try:
            Supervisor(self._options, self._look_after).run()
        except _Done:
            return 0

    def _look_after(self, server: Server) -> NoReturn:
        monitor = Monitor(server.endpoint, server.n_ctx)
        try:
            self._greet(server)
            with console.status_line() as show:
                full = False
                while True:
                    server.check()
                    if not full and (full := server.log_is_full()):
                        console.warn("the disk of the engine's log is full: lines are lost, serving goes on")
                    if console.can_draw() and (line := monitor.line()):
                        show(line)
                    time.sleep(WATCH_SECONDS)
        except (KeyboardInterrupt, Terminated):
            self._end(server, monitor)
            raise _Done from None

    def _greet(self, server: Server) -> None:
        if not self._starts and not server.needs_key:
            _say_who_may_use_it(self._options.host)
        ready = "ready again" if self._starts else "ready"
        self._starts += 1
        console.status(f"{ready}: {server.endpoint.url} (context {server.n_ctx}{_why(self._options, server.n_ctx)})")

    def _end(self, server: Server, monitor: Monitor) -> None:
        if self._options.router is not None and (mean := mean_experts(server.endpoint)) is not None:
            console.status(f"experts used per token and layer: {mean:.2f} ({self._options.router})")
        running = monitor.running()
        answers = "1 answer has" if running == 1 else f"{running} answers have"
        when = f" when {answers} ended, in {self._drain:g} s at most; a second signal stops at once"
        console.status(f"stopping{when if running else ''}")
        if not server.drain(self._drain):
            console.warn(f"cut what was not answered after {self._drain:g} s")


class _Done(Exception):  # noqa: N818 - no error
    """The server was stopped in order."""


class _Background(threading.Thread):
    """The engine belongs to this thread: the kernel ends it when the thread does, whatever becomes of the others."""

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(name="supervisor", daemon=True)
        self.failure: BaseException | None = None
        self._supervisor = Supervisor(options, self._look_after, self._pause)
        self._endpoint: Endpoint | None = None
        self._told = threading.Event()  # there is an endpoint, or a failure
        self._unwanted = threading.Event()

    def run(self) -> None:
        """Serve; whatever ends it but `stop` is the failure."""
        try:
            self._supervisor.run()
        except _Done:
            pass
        except BaseException as exc:  # raised where it is waited for
            self.failure = exc
        finally:
            self._told.set()

    def endpoint(self) -> Endpoint:
        """Wait for the engine to serve; raises what ended it before."""
        self._told.wait()
        if self._endpoint is None:
            raise self.failure or RuntimeError("stopped before it served")
        return self._endpoint

    def stop(self) -> None:
        """End the engine and the thread."""
        self._unwanted.set()
        self.join()

    def _look_after(self, server: Server) -> NoReturn:
        self._endpoint = server.endpoint
        self._told.set()
        server.wait()

    def _pause(self, seconds: float) -> None:
        if self._unwanted.wait(seconds):
            raise _Done


def _say_who_may_use_it(host: str) -> None:
    if is_loopback(host):
        console.status("no key is set: pages in a browser can use this server too; HYMOE_API_KEY sets a key")
    else:
        console.warn(f"everybody who reaches {host} can use this server; HYMOE_API_KEY sets a key")


def _warn_of_shared_keys(file: Path | None) -> None:
    if file is not None and is_shared(file):
        console.warn(f"--api-key-file {file}: other users of this machine can read or change it; chmod 600 mends that")


def _why(options: ServerOptions, n_ctx: int) -> str:
    return "; --ctx N for more" if options.ctx is None and n_ctx == DEFAULT_CTX else ""
