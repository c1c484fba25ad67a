"""What a server tells about itself, as a line: from its answers, and on a real terminal."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
from served import free_port
from terminal import TIMEOUT, Terminal, command, engine_of
from tiny_model import TRAINED

from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.loading import Loading
from hymoe.runtime.monitor import Monitor, describe, totals

pytestmark = pytest.mark.engine

METRICS = "# TYPE llamacpp:prompt_tokens_total counter\nllamacpp:prompt_tokens_total 1200\n"
METRICS += "llamacpp:tokens_predicted_total 340\n"
READING = {"is_processing": True, "n_prompt_tokens": 512, "n_prompt_tokens_processed": 512, "next_token": []}
WRITING = {**READING, "n_prompt_tokens": 530, "next_token": [{"n_decoded": 18}]}
IDLE = {**WRITING, "is_processing": False, "n_prompt_tokens": 40}


def test_what_is_under_way_counts_once() -> None:
    assert totals([IDLE], METRICS) == {"read": 1200, "written": 340}
    assert totals([IDLE, READING], METRICS) == {"read": 1712, "written": 340}
    assert totals([IDLE, WRITING], METRICS) == {"read": 1200, "written": 358}


def test_the_line() -> None:
    assert describe([IDLE, READING, WRITING], {"read": 431.6, "written": 9.94}, 32768) == (
        "slots 2/3 · reading 432, writing 9.9 tokens/s · context 1,082 of 32,768"
    )


def test_a_server_is_not_asked_all_the_time(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymoe.runtime.monitor.SECONDS", 1e9)
    monkeypatch.setattr("hymoe.runtime.monitor.ANSWER_SECONDS", TIMEOUT)
    monitor = Monitor(endpoint, TRAINED)
    body = {"prompt": "Hello", "n_predict": 4}
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    with httpx.Client(base_url=endpoint.url, headers=headers, trust_env=False, timeout=TIMEOUT) as client:
        assert client.post("/completion", json=body).status_code == 200
    assert monitor.running() == 0
    line = monitor.line()
    assert line is not None
    assert line.startswith("slots 0/4 · reading 0, writing 0.0 tokens/s · context ")
    assert monitor.line() is None


def test_nobody_there(tiny: Path) -> None:
    monitor = Monitor(Endpoint(f"http://127.0.0.1:{free_port()}"), TRAINED)
    assert (monitor.line(), monitor.running()) == (None, 0)


def test_a_loaded_model_has_been_read(endpoint: Endpoint, tiny: Path) -> None:
    pid = engine_of(os.getpid(), "--port", endpoint.url.rsplit(":", 1)[1])
    assert pid is not None
    loading = Loading(pid, tiny)
    assert loading.total == tiny.stat().st_size
    assert loading.news() == loading.total
    assert loading.news() == 0


def test_a_line_at_the_foot_of_a_terminal(llama_server: Path, tiny: Path) -> None:
    words = command("hy-serve", tiny, "--port", free_port(), "--threads", 1)
    with Terminal(words, env={"TERM": "xterm"}) as terminal:
        terminal.expect("reading the model")
        ready = terminal.expect("ready: ")
        terminal.expect(f"slots 0/4 · reading 0, writing 0.0 tokens/s · context 0 of {TRAINED}", after=ready)
        terminal.type("\x03")
        assert terminal.wait() == 0
        assert terminal.screen.endswith("stopping\n")
