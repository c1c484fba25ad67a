"""The end of a server by a signal, whatever it is doing."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from served import direct
from talker import ENDLESS, write_talker
from terminal import TIMEOUT

pytestmark = pytest.mark.engine

ROUNDS = 10
FLAGS = ("--threads", "1", "--ctx-size", "4096")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("model") / "talker.gguf", trained=ENDLESS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: signal.Signals(number).name)
def test_a_signal_just_after_a_cancelled_request(llama_server: Path, model: Path, number: signal.Signals) -> None:
    """The handler runs on the thread that handles the cancelling, as likely as not."""
    for _ in range(ROUNDS // 2):
        with direct(llama_server, model, *FLAGS, stderr=subprocess.PIPE) as (server, client):
            body = {"prompt": "count<|extra_0|>", "n_predict": 4000, "repeat_penalty": 1, "stream": True}
            with client.stream("POST", "/completion", json=body) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
            server.send_signal(number)
            server.communicate(timeout=TIMEOUT)
            assert server.returncode == 0


def test_a_second_signal_ends_it_at_once(llama_server: Path, model: Path) -> None:
    with direct(llama_server, model, *FLAGS, stderr=subprocess.PIPE) as (server, _):
        server.send_signal(signal.SIGSTOP)  # so that both are there when it goes on
        server.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGINT)
        server.send_signal(signal.SIGCONT)
        _, said = server.communicate(timeout=TIMEOUT)
    assert server.returncode == 1
    assert "Received second interrupt" in said
