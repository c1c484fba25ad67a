"""`hy-chat` as a user meets it: one answer through pipes, and a conversation on a terminal."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import httpx
import pytest

from hymoe.runtime.chat_cli import main
from hymoe.runtime.client import endpoint_from_url
from hymoe.errors import ServerError
from hymoe.runtime.server import Endpoint
from terminal import Terminal, command, ends_within, engine_of, run
from tiny_model import TRAINED

pytestmark = pytest.mark.engine

N = 12  # tokens of an answer: letters, as many as tokens
LIMIT = ("--max-tokens", N)
INTRODUCTION = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves\n"
LONG = "word " * TRAINED


def expected(endpoint: Endpoint, *messages: str, system: str | None = None) -> str:
    """What the server answers to user, assistant, user, … asked without hy-chat."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    opening = [{"role": "system", "content": system}] if system else []
    answer = httpx.post(
        f"{endpoint.url}/v1/chat/completions",
        json={"messages": opening + talk, "max_tokens": N},
        headers={"Authorization": f"Bearer {endpoint.api_key}"},
        trust_env=False,
    )
    text = answer.json()["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


@pytest.fixture
def attach(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that talks to the shared server."""
    monkeypatch.setenv("HYMOE_API_KEY", endpoint.api_key or "")
    return command("hy-chat", "--url", endpoint.url)


def test_one_shot_with_a_private_server(endpoint: Endpoint, tiny: Path) -> None:
    done = run(command("hy-chat", tiny, "-p", "Hello", *LIMIT))
    assert (done.returncode, done.stdout) == (0, expected(endpoint, "Hello") + "\n")
    assert done.stderr == f"loading {tiny}\nready (context {TRAINED})\ncut at --max-tokens\n"


def test_one_shot_from_a_pipe(endpoint: Endpoint, attach: list[str]) -> None:
    answer = expected(endpoint, "Wie geht's? 你好")
    for words in (attach, [*attach, "-p", "-"]):
        done = run([*words, *map(str, LIMIT), "-q"], stdin="Wie geht's? 你好\n".encode())
        assert (done.returncode, done.stdout, done.stderr) == (0, answer + "\n", "")


def test_a_system_prompt(endpoint: Endpoint, attach: list[str]) -> None:
    answer = expected(endpoint, "Hello", system="Be brief.")
    assert answer != expected(endpoint, "Hello")
    done = run([*attach, "-p", "Hello", "--system", "Be brief.", *map(str, LIMIT), "-q"])
    assert (done.returncode, done.stdout, done.stderr) == (0, answer + "\n", "")


def test_details(attach: list[str]) -> None:
    done = run([*attach, "-p", "Hello", *map(str, LIMIT), "-v"])
    assert re.fullmatch(rf"cut at --max-tokens\n{N} tokens, [\d.]+ tokens/s\n", done.stderr)


def test_a_conversation(endpoint: Endpoint, attach: list[str]) -> None:
    first = expected(endpoint, "Hello")
    second = expected(endpoint, "Hello", first, "/think And?")
    with Terminal([*attach, *map(str, LIMIT)]) as terminal:
        at = 0
        script = [
            ("Hello\n", f"{first}\ncut at --max-tokens\n"),
            ("/think And?\n", f"{second}\ncut at --max-tokens\n"),
            ("\n", ""),
            ("/rest\n", "unknown command /rest; /help lists them\n"),
            (LONG + "\n", None),
            ("/reset\n", "the conversation is forgotten\n"),
            ("Hello\n", f"{first}\ncut at --max-tokens\n"),
            ("\x03", "^C\nCtrl-D or /exit leaves\n"),
        ]
        shown = INTRODUCTION
        for typed, answer in script:
            at = terminal.expect("> ", after=at)
            if len(typed) > 1000:  # a line longer than the terminal's own limit needs readline
                typed = "word " * 600 + "\n"
            terminal.type(typed)
            if answer is None:
                terminal.expect("error: context full: the conversation has ", after=at)
                at = terminal.expect("a larger --ctx holds more\n", after=at)
        terminal.expect("> ", after=at)
        terminal.type("\x04")
        assert terminal.wait() == 0
        del shown
