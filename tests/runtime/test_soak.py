"""Many clients at a time, some that go away and some that ask nonsense: nothing is lost, answers or memory."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from served import served
from talker import write_talker
from terminal import TIMEOUT

pytestmark = pytest.mark.engine

N_CLIENTS = 8
# Of the engine, from the end of the warm-up to any time in the second half. Ten minutes and 14,161 requests: 1.2 MB.
GROWTH_BYTES = 16 << 20
WARM_UP = 0.3  # of the time
SECONDS = float(os.environ.get("HYMOE_SOAK_SECONDS", "600"))

GOOD = {"prompt": "alphabet<|extra_0|>", "n_predict": 8}
COUNTED = {"prompt": "count<|extra_0|>", "n_predict": 40, "repeat_penalty": 1}
# What is wrong -> the status that says so.
BAD: dict[str, tuple[str, bytes, int]] = {
    "broken JSON": ("/v1/chat/completions", b'{"messages": [', 400),
    "no messages": ("/v1/chat/completions", b'{"messages": []}', 400),
    "an unknown role": ("/v1/chat/completions", b'{"messages": [{"role": "cook", "content": "x"}]}', 400),
    "a wrong type": ("/completion", b'{"prompt": "x", "stop": 7}', 400),
    "too long a prompt": ("/completion", b'{"prompt": "' + b"x " * 9000 + b'"}', 400),
    "no such path": ("/v1/none", b"{}", 404),
}


class Client(threading.Thread):
    """Asks until the time is over; `counts` has what it did, `failures` what went wrong with good requests."""

    def __init__(self, url: str, until: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._url = url
        self._until = until
        self._random = random.Random(seed)

    def run(self) -> None:
        with httpx.Client(base_url=self._url, trust_env=False, timeout=TIMEOUT) as client:
            while time.monotonic() < self._until:
                act = self._random.choice((self._ask, self._ask, self._stream, self._stream, self._leave, self._err))
                self.counts[act.__name__] += 1
                try:
                    act(client)
                except (httpx.HTTPError, AssertionError, ValueError) as exc:
                    self.failures.append(f"{act.__name__}: {exc!r}")

    def _ask(self, client: httpx.Client) -> None:
        answer = client.post("/completion", json=GOOD)
        assert (answer.status_code, answer.json()["content"]) == (200, "abcdef")

    def _stream(self, client: httpx.Client) -> None:
        with client.stream("POST", "/completion", json={**COUNTED, "stream": True}) as answer:
            text = "".join(re.findall(r'"content":"([^"]*)"', "\n".join(answer.iter_lines())))
        assert text == 20 * "one two"

    def _leave(self, client: httpx.Client) -> None:
        """Go away in the middle of an answer, on a connection of its own."""
        body = {**COUNTED, "n_predict": 1000, "stream": True}
        with (
            httpx.Client(base_url=self._url, trust_env=False, timeout=TIMEOUT) as own,
            own.stream("POST", "/completion", json=body) as answer,
        ):
            lines = answer.iter_lines()
            for _ in range(self._random.randrange(1, 20)):
                next(lines)

    def _err(self, client: httpx.Client) -> None:
        path, body, status = BAD[self._random.choice(list(BAD))]
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def resident(pid: int) -> int:
    """Bytes of memory that a process has (Linux)."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def soak(model: Path, seconds: float) -> tuple[list[Client], list[int]]:
    """Run the clients; give them, and the engine's memory from the end of the warm-up on, in equal steps."""
    with served(model, "--ctx", 16384, "--", "--parallel", "4") as server:
        begun = time.monotonic()
        clients = [Client(server.url, begun + seconds, seed) for seed in range(N_CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(WARM_UP * seconds)
        memory = []
        while time.monotonic() < begun + seconds:
            memory.append(resident(server.engine))
            time.sleep(seconds / 20)
        for client in clients:
            client.join(TIMEOUT)
        memory.append(resident(server.engine))
        slots = server.ask("/slots").json()
        assert not any(slot["is_processing"] for slot in slots)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert not [line for line in server.lines if "warning" in line]
    return clients, memory


def check(model: Path, seconds: float) -> None:
    clients, memory = soak(model, seconds)
    assert [failure for client in clients for failure in client.failures] == []
    done = sum((client.counts for client in clients), Counter[str]())
    assert min(done.values()) > 0
    assert len(done) == 4
    assert max(memory[len(memory) // 2 :]) - memory[0] < GROWTH_BYTES, memory


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("model") / "talker.gguf", trained=16384)


def test_twenty_seconds(llama_server: Path, talker: Path) -> None:
    check(talker, 20)


@pytest.mark.long
def test_ten_minutes(llama_server: Path, talker: Path) -> None:
    check(talker, SECONDS)
