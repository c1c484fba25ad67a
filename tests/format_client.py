"""Scripted models for the format's tests, and what a client puts together from a server's answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from format_reader import Message
from format_shapes import Call, Shape
from scripted_model import NEWLINE, START, Script, cut, write_scripted

SIZES = (4, 5, 6, 7, 9, 3)  # of pieces, in characters
PER_MODEL = 12
TIMEOUT = 120  # seconds; far more than any answer takes


class Book:
    """Scripts for one model; `add` raises ValueError where a text shares too much with those before it."""

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self._taken: set[str] = set()

    def add(self, when: str, text: str, *, closed: bool = False, circle: int | None = None) -> None:
        """Let a prompt that holds the word `when` be answered by `text`; `closed`: where a thought is closed already.

        circle: which piece the script goes on with at its end, for ever.
        """
        pieces = self._cut(text)
        after = NEWLINE if closed else START
        self.scripts.append(Script(pieces, when=when, after=after, then=None if circle is None else pieces[circle]))
        self._taken.update(pieces)

    def _cut(self, text: str) -> list[str]:
        for size in SIZES:
            with suppress(ValueError):
                return cut(text, size, frozenset(self._taken))
        raise ValueError(f"{text!r} shares its pieces")

    def write(self, path: Path, template: str) -> Path:
        """Write the model."""
        return write_scripted(path, self.scripts, template=template)


def books(shapes: Iterable[Shape]) -> Iterator[tuple[Book, dict[str, Shape]]]:
    """Pack shapes into as few models as will hold them, in order; a shape is asked for by its word."""
    book, words = Book(), dict[str, Shape]()
    for number, shape in enumerate(shapes):
        word = f"shape{number};"
        try:
            if len(words) == PER_MODEL:
                raise ValueError
            book.add(word, shape.text, closed=bool(shape.begun))
        except ValueError:  # it is full, or the shape shares too much with those before it
            yield book, words
            book, words = Book(), {}
            book.add(word, shape.text, closed=bool(shape.begun))
        words[word] = shape
    yield book, words


def function(name: str, **properties: Any) -> dict[str, Any]:
    """A tool whose arguments are all required."""
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "A test's.", "parameters": schema}}


def ask(url: str, text: str | Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Post one chat request; `text` is the user's words, or all messages. The answer is the whole body."""
    body = {
        "messages": [{"role": "user", "content": text}] if isinstance(text, str) else text,
        "max_tokens": 200,
        **more,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def message_of(answer: dict[str, Any]) -> Message:
    """The message of a whole answer."""
    message = answer["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    reasoning, content = message.get("reasoning_content") or "", message.get("content") or ""
    return Message(reasoning, content, tuple(Call(call["name"], call["arguments"]) for call in calls))


def stream(url: str, text: str | Sequence[dict[str, Any]], **more: Any) -> tuple[Message, list[dict[str, Any]]]:
    """Ask with streaming: the message that the deltas make, and the deltas."""
    body = {
        "messages": [{"role": "user", "content": text}] if isinstance(text, str) else text,
        "max_tokens": 200,
        **more,
    }
    deltas: list[dict[str, Any]] = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=TIMEOUT) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                deltas += [choice["delta"] for choice in chunk["choices"]]
    return _joined(deltas), deltas


def _joined(deltas: Sequence[dict[str, Any]]) -> Message:
    parts = {name: "".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content")}
    calls: list[list[str]] = []
    for part in (call for delta in deltas for call in delta.get("tool_calls") or []):
        if part["index"] == len(calls):
            assert part["id"], "a call begins with its id"
            assert part["function"]["name"], "a call begins with its name"
            calls.append([part["function"]["name"], ""])
        calls[part["index"]][1] += part["function"].get("arguments") or ""
    return Message(
        parts["reasoning_content"], parts["content"], tuple(Call(name, arguments) for name, arguments in calls)
    )
