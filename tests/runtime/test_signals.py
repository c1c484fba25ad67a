"""The end of a server by a signal, whatever it is doing."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from children import child
from talker import ENDLESS, write_talker
from terminal import TIMEOUT

from hymoe.runtime import process

pytestmark = pytest.mark.engine

ROUNDS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("model") / "talker.gguf", trained=ENDLESS)


@contextmanager
def running(llama_server: Path, model: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The engine's server itself, healthy."""
    port = process.free_port("127.0.0.1")
    command = [str(llama_server), "--model", str(model), "--port", str(port), "--threads", "1", "--ctx-size", "4096"]
    transport = httpx.HTTPTransport(retries=6)  # of connecting, with growing pauses
    with (
        child(command, stderr=subprocess.PIPE) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=TIMEOUT) as client,
    ):
        while client.get("/health").status_code != httpx.codes.OK:
            assert server.poll() is None
        yield server, client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: signal.Signals(number).name)
def test_a_signal_just_after_a_cancelled_request(llama_server: Path, model: Path, number: signal.Signals) -> None:
    """The handler runs on the thread that handles the cancelling, as likely as not."""
    for _ in range(ROUNDS // 2):
        with running(llama_server, model) as (server, client):
            body = {"prompt": "count<|extra_0|>", "n_predict": 4000, "repeat_penalty": 1, "stream": True}
            with client.stream("POST", "/completion", json=body) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
            server.send_signal(number)
            server.communicate(timeout=TIMEOUT)
            assert server.returncode == 0


def test_a_second_signal_ends_it_at_once(llama_server: Path, model: Path) -> None:
    with running(llama_server, model) as (server, _):
        server.send_signal(signal.SIGSTOP)  # so that both are there when it goes on
        server.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGINT)
        server.send_signal(signal.SIGCONT)
        _, said = server.communicate(timeout=TIMEOUT)
    assert server.returncode == 1
    assert "Received second interrupt" in said
