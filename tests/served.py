"""hy-serve as a process of its own, what it says, and clients that stream from it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from children import child
from terminal import TIMEOUT, command, engine_of, is_running

from hymoe.runtime import process
from hymoe.runtime.server import ServerOptions, serve

ENDLESS_QUESTION: dict[str, Any] = {"prompt": "count<|extra_0|>", "n_predict": -1, "repeat_penalty": 1, "stream": True}


class Served:
    """A hy-serve that was started; what it writes to stderr is in `lines`."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def engine(self) -> int:
        """The process id of the engine that runs now."""
        pid = engine_of(self.process.pid)
        assert pid is not None
        return pid

    def expect(self, text: str, after: int = 0) -> int:
        """Wait for a line with `text` behind the first `after` lines; give the number of lines up to it."""
        deadline = time.monotonic() + TIMEOUT
        with self._more:
            while True:
                for number, line in enumerate(self.lines[after:], after + 1):
                    if text in line:
                        return number
                alive = self._reader.is_alive() and time.monotonic() < deadline
                assert alive, "".join([f"no {text!r}:\n", *self.lines])
                self._more.wait(0.2)

    def end(self) -> int:
        """Wait for its end and give the exit status."""
        status = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return status

    def ask(self, path: str = "/completion", **body: object) -> httpx.Response:
        """Ask the server, or the path without a body."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=TIMEOUT) as client:
            return client.post(path, json=body) if body else client.get(path)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()
        with self._more:
            self._more.notify_all()


@contextmanager
def served(
    model: Path,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    ready: bool = True,
    before: Sequence[str] = (),
) -> Iterator[Served]:
    """Run hy-serve on a free port; unless `ready` is False, the block begins when it is ready.

    before: words that change what it runs in, and then become it.
    """
    port = free_port()
    words = [*before, *command("hy-serve", model, "--port", port, "--threads", 1, *arguments)]
    environment = {**os.environ, **(env or {})}
    with child(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as started:
        server = Served(started, port)
        if ready:
            server.expect("ready: ")
        yield server


@contextmanager
def client_of(model: Path, **options: Any) -> Iterator[httpx.Client]:
    """A client of a server that this process looks after, with ServerOptions; it sends no key."""
    with (
        serve(ServerOptions(model, **{"port": 0, "threads": 1, **options})) as endpoint,
        httpx.Client(base_url=endpoint.url, trust_env=False, timeout=TIMEOUT) as client,
    ):
        yield client


@contextmanager
def direct(
    tool: Path, model: Path, *arguments: str, stderr: int = subprocess.DEVNULL
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A llama-server with nothing of hy-serve's between, healthy, and a client of it."""
    port = free_port()
    words: list[str | Path] = [tool, "--model", model, "--port", str(port), *arguments]
    with (
        child(words, stderr=stderr) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=TIMEOUT) as client,
    ):
        deadline = time.monotonic() + TIMEOUT
        while not is_healthy(client):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield server, client


def is_healthy(client: httpx.Client) -> bool:
    """Whether the server answers and has its model."""
    try:
        return client.get("/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def limited(address_space: int) -> list[str]:
    """What gives a program, and each of its children, so many bytes of address space."""
    return ["sh", "-c", f'ulimit -v {address_space >> 10}; exec "$@"', "sh"]


class Streaming(threading.Thread):
    """A client that reads a stream to its end: `pieces` of text, and the `error` that it ended with."""

    def __init__(self, url: str, question: Mapping[str, object] = ENDLESS_QUESTION) -> None:
        super().__init__(daemon=True)
        self.pieces: list[str] = []
        self.error: Exception | None = None
        self.begun = threading.Event()
        self._url = url
        self._question = dict(question)

    def run(self) -> None:
        try:
            with (
                httpx.Client(base_url=self._url, trust_env=False, timeout=TIMEOUT) as client,
                client.stream("POST", "/completion", json=self._question) as answer,
            ):
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self.pieces.append(json.loads(line.removeprefix("data: "))["content"])
                        self.begun.set()
        except httpx.HTTPError as exc:
            self.error = exc


@contextmanager
def streaming(url: str, n_clients: int = 4) -> Iterator[list[Streaming]]:
    """Clients that each have begun to read an answer without end."""
    clients = [Streaming(url) for _ in range(n_clients)]
    for client in clients:
        client.start()
    for client in clients:
        assert client.begun.wait(TIMEOUT)
    yield clients


def free_port() -> int:
    """A port that is free now."""
    return process.free_port("127.0.0.1")


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started and that still run (Linux)."""
    tasks = Path(f"/proc/{pid}/task")
    found = [int(child) for task in tasks.glob("*/children") for child in task.read_text().split()]
    return [child for child in found if is_running(child)]
