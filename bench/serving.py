"""One engine's server with one setting, and how fast it answers: what the benchmarks of placements measure."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import say
from sized_model import Shape

LOAD_SECONDS = 1800
ANSWER_SECONDS = 3600


@dataclass(frozen=True)
class Use:
    """Tokens of a prompt and of its answer."""

    prompt: int
    answer: int


@dataclass(frozen=True)
class Setting:
    """A server's arguments and environment, under the name that a table gives them. engine: None is ours."""

    name: str
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    engine: Path | None = None


@dataclass(frozen=True)
class Speeds:
    """Tokens per second."""

    prefill: float
    generation: float

    def seconds(self, use: Use) -> float:
        return use.prompt / self.prefill + use.answer / self.generation


def table(rows: Mapping[str, Speeds | None], use: Use) -> None:
    """Print speeds, and the seconds that they make of `use`."""
    print(f"{'setting':44}{'prefill':>10}{'generation':>12}{'seconds':>9}")
    for name, speeds in rows.items():
        if speeds is None:
            print(f"{name:44}{'does not load':>31}")
        else:
            print(f"{name:44}{speeds.prefill:10.2f}{speeds.generation:12.2f}{speeds.seconds(use):9.1f}")


def loads(gguf: Path, setting: Setting) -> bool:
    with server(gguf, setting) as port:
        say(f"{setting.name}: {'does not load' if port is None else 'loads'}")
        return port is not None


def measure(gguf: Path, setting: Setting, use: Use, *, n_warm: int = 2) -> Speeds | None:
    """Give the server's own speeds for random tokens; None where it does not come up or does not live to answer.

    n_warm: tokens of a prompt before the one that counts.
    """
    import numpy as np

    ids = np.random.default_rng(1).integers(1000, Shape(1).n_vocab, use.prompt).tolist()
    with server(gguf, setting) as port:
        if port is None:
            say(f"{setting.name}: does not load")
            return None
        try:
            ask(port, ids[:n_warm], 1)
            timings = ask(port, ids, use.answer)
        except OSError as exc:  # a device may run out of memory as late as here
            say(f"{setting.name}: does not answer ({exc})")
            return None
    assert timings["prompt_n"] == use.prompt
    found = Speeds(timings["prompt_per_second"], timings["predicted_per_second"])
    say(f"{setting.name}: {found.prefill:.2f} and {found.generation:.2f} tokens/s")
    return found


def turns(gguf: Path, settings: Sequence[Setting], use: Use, n_turn: int, *, n_warm: int = 2) -> list[list[Speeds]]:
    """Measure the settings `n_turn` times one after the other, every second time in reverse; gives each turn's."""
    found = []
    for turn in range(n_turn):
        order = settings[:: 1 - 2 * (turn % 2)]
        speeds = {setting: measure(gguf, setting, use, n_warm=n_warm) for setting in order}
        if not all(speeds.values()):
            raise SystemExit("what loaded before does not load any more")
        found.append([speed for setting in settings if (speed := speeds[setting])])
    return found


@contextmanager
def server(gguf: Path, setting: Setting) -> Iterator[int | None]:
    """Run a server; gives its port, None where it ends before it answers."""
    from hymoe import engine as engines
    from hymoe.runtime import process

    tool = setting.engine / "llama-server" if setting.engine else engines.find().tool("llama-server")
    port = process.free_port("127.0.0.1")
    command: Sequence[str | Path] = [tool, "--model", gguf, "--port", str(port), *setting.arguments]
    environment = os.environ | dict(setting.environment)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            yield port if healthy(child, port) else None
        finally:
            child.kill()


def healthy(child: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + LOAD_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def ask(port: int, ids: list[int], n_answer: int) -> dict[str, Any]:
    body = {"prompt": ids, "n_predict": n_answer, "cache_prompt": False, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        timings: dict[str, Any] = json.loads(answer.read())["timings"]
    return timings
