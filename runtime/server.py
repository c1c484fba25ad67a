"""One engine process: start it, wait until it answers, stop it, and never leave it behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from hymoe import console
from hymoe.errors import ServerError
from hymoe.runtime import overrides, process, workers
from hymoe.runtime.endpoint import Endpoint, check_access, keys_of
from hymoe.runtime.header import Header, peek
from hymoe.runtime.loading import Loading
from hymoe.runtime.router import Router, engine_arguments

if TYPE_CHECKING:
    import httpx

    from hymoe.runtime.planned import Plan

# 32,768 tokens of KV are 4 GiB for Hunyuan-A13B in F16; all of its 262,144 would be 32 GiB.
DEFAULT_CTX = 32768
TAIL_LINES = 12
LOG_LINES = 100  # looked at for what says that memory was short
MORE_MEMORY = "it needs more memory than there is: a smaller --ctx, or a file with fewer bits, needs less"
POLL_SECONDS = 0.05
STILL_LOADING_SECONDS = 10.0
PORT_ATTEMPTS = 3

# A line of the engine's log: time, level, and what it says.
LOADING_ERROR = "error loading model: "
ERROR_LINE = re.compile(r"\s*[\d.]+ E (.*\S)")
ABORT_LINE = re.compile(r"/\S+\.(?:c|cpp|cu|h|m):\d+: (.*)")
# What the backends and the C++ library say when memory is short.
MEMORY_LINE = re.compile(
    r"failed to allocate|unable to allocate|out of memory|bad_alloc|cudaMalloc failed|OutOf(?:Device|Host)Memory", re.I
)

# llama-server flag -> what to do instead. These are given by us, or would make wrong answers.
OWNED_FLAGS = {
    **dict.fromkeys(
        (
            *("-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo"),
            *("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file"),
        ),
        "give the model, a file, as the first argument",
    ),
    "--host": "give --host before the --",
    "--port": "give --port before the --",
    **dict.fromkeys(("-c", "--ctx-size"), "give --ctx before the --"),
    **dict.fromkeys(("-t", "--threads"), "give --threads before the --"),
    "--api-key": "set HYMOE_API_KEY: other users of this machine can read a command line",
    "--rpc": "give --rpc before the --",
    "--api-key-file": "give --api-key-file before the --",
    "--api-prefix": "put a proxy in front to serve under a path",
    "--context-shift": "moved keys give wrong answers: this family's attention depends on absolute positions",
    "--cache-reuse": "moved keys give wrong answers: this family's attention depends on absolute positions",
    **dict.fromkeys(
        ("-h", "--help", "--usage", "--version", "--list-devices", "-cl", "--cache-list", "--completion-bash"),
        "it serves nothing; give it to the llama-server in the folder that `hy-engine path` prints",
    ),
}


@dataclass(frozen=True)
class ServerOptions:
    """What to serve, where and how."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 8080  # 0: a free one
    ctx: int | None = None  # tokens; None: the trained context up to DEFAULT_CTX; 0: the trained context
    threads: int | None = None
    plan: Plan | None = None  # where the model goes; None: where the engine puts it. See placing.place
    router: Router | None = None  # None: the mode that the file asks for, or topk
    api_key: str | None = None
    api_key_file: Path | None = None  # keys, one a line; # begins a comment
    insecure: bool = False  # whether other machines may use it without a key
    rpc: tuple[str, ...] = ()  # workers, host:port, whose devices are used as well
    extra: tuple[str, ...] = ()  # further llama-server arguments
    log: Path | None = None  # the engine's output is appended here
    log_limit: int | None = None  # bytes at which it starts over, with a copy kept beside it; None: never


class ServerExitError(ServerError):
    """The engine ended by itself.

    status: what a shell would show. tail: the last lines it wrote. served: whether it had been healthy. complaints:
    its lines about memory. out_of_memory: whether it ended for want of that while it loaded, by what it said or because
    it was killed, which is how the kernel does it.
    """

    def __init__(self, returncode: int, log: list[str], *, served: bool) -> None:
        self.complaints = [line for line in log if MEMORY_LINE.search(line)]
        self.out_of_memory = not served and (bool(self.complaints) or returncode == -signal.SIGKILL)
        self.served = served
        self.tail = log[-TAIL_LINES:]
        # What never served has not succeeded.
        self.status = process.shell_status(returncode) or int(not served)
        when = "while serving" if served else "while it was starting"
        reason = [_abort(log) or _reason(self.tail), MORE_MEMORY if self.out_of_memory else None]
        super().__init__(
            f"the engine stopped {when}: {process.describe(returncode)}", fix="; ".join(filter(None, reason)) or None
        )


@contextmanager
def serve(model: Path | str | ServerOptions) -> Iterator[Endpoint]:
    """Run the engine for the length of a `with` block, which begins when it is healthy; after a crash it runs again.

    model: a file, which is placed by a plan and served on a free port; or all that can be chosen, and then with the
    plan that `placing.place` gave it, if any. Raises as `Server` and `place` do, and at the end of the block where the
    engine had to be given up.
    """
    from hymoe.runtime.placing import place
    from hymoe.runtime.supervise import background

    options = model if isinstance(model, ServerOptions) else place(ServerOptions(Path(model), port=0))
    with background(options) as endpoint:
        yield endpoint


class Server:
    """One llama-server process, as a context manager: entering waits for health, leaving stops it.

    Entering raises ModelFileError for a file that is no model of this family, EngineError where no engine is built,
    ServerError for a port that is taken and for bad options, ServerExitError where the engine gives up.

    pause: waits that many seconds; what it raises ends what waits.
    """

    def __init__(self, options: ServerOptions, pause: Callable[[float], None] = time.sleep) -> None:
        self.options = options
        self.port = options.port
        self.endpoint = Endpoint("")
        self.n_ctx = 0
        self.needs_key = True  # whether clients must send a key; False when the engine answers without one
        self.served = False
        self._pause = pause
        self._process: subprocess.Popen[bytes] | None = None
        self._log: process.Log | None = None
        self._overrides: list[overrides.Override] = []
        self._keys: list[str] = []

    def __enter__(self) -> Self:
        from hymoe import engine

        check_flags(self.options.extra)
        self._keys = checked_keys(self.options)
        header = peek(self.options.model)
        workers.check(self.options.rpc)
        tool = engine.find().tool("llama-server")
        plan = self.options.plan
        self.n_ctx = plan.setting.n_ctx if plan else context_size(self.options.ctx, header)
        self._overrides = overrides.find(header, self.n_ctx, self.options.extra)
        if self._overrides:
            console.status(overrides.line(header, self._overrides))
        try:
            self._start(tool, header)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Pass on what the engine logged with -v; raises ServerExitError where it has ended."""
        self._echo()
        returncode = self._running().poll()
        if returncode is not None:
            raise self._exit_error(returncode)

    def wait(self) -> NoReturn:
        """Wait for the engine to end by itself, which raises ServerExitError."""
        while True:
            self.check()
            self._pause(4 * POLL_SECONDS)

    def stop(self) -> int:
        """End the engine at once if it runs and give its exit status; 0 where it never started."""
        if self._process is None:
            return 0
        status = process.shell_status(process.stop(self._process, how=signal.SIGINT))
        if self._log:
            self._echo()
            self._log.close()
            self._log = None
        return status

    def drain(self, seconds: float) -> bool:
        """Let the engine finish the answers that run, and refuse new requests; False where that takes longer."""
        running = self._running()
        if running.poll() is None:
            running.terminate()
        deadline = time.monotonic() + seconds
        while running.poll() is None and time.monotonic() < deadline:
            self._echo()
            self._pause(POLL_SECONDS)
        return running.poll() is not None

    def log_is_full(self) -> bool:
        """Whether the engine's log has no room on its disk, so that lines are lost."""
        return self._log is not None and self._log.is_full()

    def _start(self, tool: Path, header: Header) -> None:
        for attempt in range(PORT_ATTEMPTS):
            options = self._with_port()
            self.port = options.port
            key = next(iter(self._keys), None)  # any of them will do for us
            self.endpoint = Endpoint(f"http://{_connect_host(options.host)}:{options.port}", key)
            self._log = process.Log(options.log, options.log_limit)
            command = command_line(tool, header, options, self.n_ctx, self._overrides)
            console.detail(f"starting {' '.join(command)}")
            self._process = process.spawn(command, _environment(options), self._log.file)
            try:
                self._wait_until_healthy(options)
            except ServerExitError:
                # Between our look and the engine's bind somebody else may have come.
                if process.port_is_free(options.host, options.port):
                    raise
                self.stop()
                if self.options.port or attempt + 1 == PORT_ATTEMPTS:
                    raise _port_taken(options.port) from None
            else:
                return

    def _with_port(self) -> ServerOptions:
        options = self.options
        if not options.port:
            return replace(options, port=process.free_port(options.host))
        if not process.port_is_free(options.host, options.port):
            raise _port_taken(options.port)
        return options

    def _wait_until_healthy(self, options: ServerOptions) -> None:
        import httpx

        loading = Loading(self._running().pid, options.model)
        begun = told = time.monotonic()
        # trust_env=False: a proxy of the environment must never come between us and our own machine.
        with (
            httpx.Client(base_url=self.endpoint.url, trust_env=False, timeout=5.0) as client,
            console.progress("reading the model", loading.total) as tick,
        ):
            while not self._is_healthy(client, options.port):
                if news := loading.news():
                    tick(news)
                    told = time.monotonic()
                elif (now := time.monotonic()) - told >= STILL_LOADING_SECONDS:
                    told = now
                    console.status(f"still loading after {now - begun:.0f} s")
                self._pause(POLL_SECONDS)
        self.served = True

    def _is_healthy(self, client: httpx.Client, port: int) -> bool:
        import httpx

        self._echo()
        running = self._running()
        returncode = running.poll()
        if returncode is not None:
            raise self._exit_error(returncode)
        try:
            if client.get("/health").status_code != httpx.codes.OK or not process.owns_port(running.pid, port):
                return False
            # Asked, not deduced: what the engine does is what counts.
            self.needs_key = bool(self._keys) or client.get("/v1/models").status_code != httpx.codes.OK
        except httpx.TransportError:
            return False
        return True

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not entered")
        return self._process

    def _exit_error(self, returncode: int) -> ServerExitError:
        return ServerExitError(returncode, self._log.tail(LOG_LINES) if self._log else [], served=self.served)

    def _echo(self) -> None:
        if self._log:
            for line in self._log.new_lines():
                console.detail(line)


def checked_keys(options: ServerOptions) -> list[str]:
    """Give the keys that clients may send. Raises ServerError for bad ones, and for none where there has to be one."""
    keys = [options.api_key] if options.api_key else []
    keys += keys_of(options.api_key_file) if options.api_key_file else []
    check_access(options.host, keys, insecure=options.insecure)
    return keys


def check_flags(extra: tuple[str, ...]) -> None:
    """Refuse llama-server arguments that are ours to give. Raises ServerError naming the first."""
    for argument in extra:
        # The engine reads --api_key as --api-key.
        flag = argument.split("=", 1)[0]
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag in OWNED_FLAGS:
            raise ServerError(f"llama-server argument {flag}: not accepted", fix=OWNED_FLAGS[flag])


def context_size(asked: int | None, header: Header) -> int:
    """Choose the context in tokens: what was asked for, else the trained one but no more than DEFAULT_CTX."""
    trained = header.context_length
    if asked is None:
        return min(trained or DEFAULT_CTX, DEFAULT_CTX)
    if asked == 0:
        if trained is None:
            raise ServerError(
                f"{header.path}: does not say its trained context", got="--ctx 0", expected="a number of tokens"
            )
        return trained
    if trained is not None and asked > trained:
        console.warn(
            f"--ctx {asked} is more than the {trained} tokens the model was trained for; it will be cut to that"
        )
        return trained
    return asked


def command_line(
    tool: Path, header: Header, options: ServerOptions, n_ctx: int, made_up: Sequence[overrides.Override] = ()
) -> list[str]:
    """Give the llama-server command; the API key is not in it, it travels in the environment.

    made_up: what the file lacks and the command makes up for.
    """
    command = [str(tool), "--model", str(options.model.absolute())]
    command += ["--host", options.host, "--port", str(options.port), "--no-context-shift", "--jinja"]
    if options.plan is not None:
        command += options.plan.arguments()
    else:
        command += ["--ctx-size", str(n_ctx)]
        command += ["--rpc", ",".join(options.rpc)] if options.rpc else []
    if options.api_key_file is not None:
        command += ["--api-key-file", str(options.api_key_file.absolute())]
    # No --cors-origins: a page opened as a file, as mikupad is, sends `Origin: null`, and "localhost" shuts it out.
    # Any UI can talk to us without flags, so any page can; a key is what keeps strangers out, and hy-serve says so.
    if options.threads is not None and options.plan is None:
        command += ["--threads", str(options.threads)]
    # /metrics has, among others, the number of experts used
    command += [*engine_arguments(options.router, header, n_ctx), "--metrics"]
    if header.chat_template is None:
        # Without one the engine would speak ChatML, whose tokens this family has never seen.
        from hymoe.chat_templates.render import FALLBACK

        command += ["--chat-template-file", str(FALLBACK)]
    return command + overrides.arguments(made_up) + list(options.extra)


def _environment(options: ServerOptions) -> dict[str, str]:
    from hymoe import engine

    dropped = sorted(name for name in os.environ if name.startswith(engine.IGNORED_VARIABLES))
    if dropped:
        console.warn(f"{', '.join(dropped)}: ignored; give llama-server arguments after --")
    env = engine.environment()
    if options.plan:
        env |= {name: value for name, value in options.plan.environment().items() if name not in engine.WAITING}
    if not console.is_verbose():
        # An engine that ends itself would start a debugger for a report first, and be away for seconds.
        env.setdefault("GGML_NO_BACKTRACE", "1")
    if options.api_key:
        env["LLAMA_API_KEY"] = options.api_key
    else:
        env.pop("LLAMA_API_KEY", None)
    return env


def _connect_host(host: str) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]" if ":" in reachable else reachable


def _port_taken(port: int) -> ServerError:
    return ServerError(
        f"port {port}", got="one in use by another program", expected="a free one", fix="give another with --port"
    )


def _abort(log: list[str]) -> str | None:
    """Find the failed assertion, or whatever else the engine ends itself for; a debugger's report may follow it."""
    found = [match[1] for line in log if (match := ABORT_LINE.match(line))]
    return f"its log says: {found[-1].strip()}" if found else None


def _reason(tail: list[str]) -> str | None:
    """Find the line that says why.

    What is wrong with the model, else the first line logged as an error, else the last that speaks of one. What it logs
    after the first are consequences; that no layers could be fitted to a GPU's memory is never the end.
    """
    for line in tail:
        if (at := line.find(LOADING_ERROR)) >= 0:
            return f"its log says: {line[at:].strip()}"
    for line in tail:
        logged = ERROR_LINE.match(line)
        if logged and "common_fit_params" not in line:
            return f"its log says: {logged[1]}"
    for line in reversed(tail):
        if "error" in line.lower() or "failed" in line.lower():
            return f"its log says: {line.strip()}"
    return None
