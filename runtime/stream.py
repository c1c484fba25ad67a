"""From the bytes of a streamed chat answer to pieces of text: pure, so that tests need no server.

A server sends events (https://html.spec.whatwg.org/multipage/server-sent-events.html) whose data is JSON in the form
of OpenAI's chat.completion.chunk, and `[DONE]` at the end. Chunks of bytes may be cut anywhere, inside a character too.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from hymoe.errors import ServerError

T = TypeVar("T", dict[str, object], list[object], str)


@dataclass(frozen=True)
class Piece:
    """A piece of an answer, or of the thought before it."""

    kind: Literal["thought", "text"]
    text: str


# Where a delta carries text -> what that text is. `reasoning_content` is what servers that split thoughts send.
_DELTA_KINDS: dict[str, Literal["thought", "text"]] = {"reasoning_content": "thought", "content": "text"}


class EventDecoder:
    """Cut a byte stream into the data of its events."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Give the data of every event that `chunk` completes."""
        text = self._rest + self._utf8.decode(chunk)
        # A carriage return at the end may be the first half of \r\n: keep it for the next chunk.
        held = text.endswith("\r")
        lines = (text[:-1] if held else text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._rest = lines.pop() + ("\r" if held else "")
        for line in lines:
            field, _, value = line.partition(":")
            if field == "data":
                self._data.append(value.removeprefix(" "))
            elif not line and self._data:
                data, self._data = "\n".join(self._data), []
                yield data


class ChatStream:
    """Route a chat answer: feed bytes, get pieces; `finished` and `reason` say how it ended."""

    def __init__(self) -> None:
        self._events = EventDecoder()
        self.finished = False
        self.reason = ""  # "stop", "length", "tool_calls"; "" until the server says
        self.timings: dict[str, float] = {}  # llama-server's own: predicted_n tokens, predicted_per_second, …

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        """Give the pieces that `chunk` completes. Raises ServerError for an error event and for no chat stream."""
        for data in self._events.feed(chunk):
            if data == "[DONE]":
                self.finished = True
                return
            try:
                pieces = self._pieces(json.loads(data))
            except (ValueError, TypeError, RecursionError) as exc:
                raise ServerError(
                    "the server's answer is no chat stream",
                    got=repr(data[:60]),
                    expected="a chat completion chunk",
                    fix="is this a llama-server?",
                ) from exc
            yield from pieces

    def _pieces(self, event: object) -> list[Piece]:
        """Give the pieces of one event. Raises ServerError for an error, TypeError where a type is another."""
        if isinstance(event, dict) and event.get("error") is not None:
            raise ServerError(error_text(event))
        timings = _field(event, "timings", dict)
        # A number beyond these bounds (or NaN) tells nobody anything, and cannot always be printed.
        self.timings |= {key: n for key, n in timings.items() if isinstance(n, int | float) and 0 <= n < 1e15}
        pieces = []
        # The chunk that carries only usage has no choices.
        for choice in _field(event, "choices", list):
            delta = _field(choice, "delta", dict)
            texts = {kind: _field(delta, key, str) for key, kind in _DELTA_KINDS.items()}
            # JSON can hold half of a surrogate pair, which nothing can print.
            pieces += [Piece(kind, text.encode("utf-8", "replace").decode()) for kind, text in texts.items() if text]
            self.reason = _field(choice, "finish_reason", str) or self.reason
        return pieces


def error_text(body: object) -> str:
    """Say in one line what an error body means, and what to do where that is known."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return f"the server refused: {error or body}"
    if error.get("type") == "exceed_context_size_error":
        return (
            f"context full: the conversation has {error.get('n_prompt_tokens', '?')} tokens, "
            f"the server holds {error.get('n_ctx', '?')}; /reset starts over, a larger --ctx holds more"
        )
    return f"the server refused: {error.get('message') or error}"


def _field(body: object, key: str, kind: type[T]) -> T:
    """Give `body[key]`, empty where it is missing or null. Raises TypeError where it or `body` is of another type."""
    if not isinstance(body, dict):
        raise TypeError(f"{body!r} is no object")
    value = body.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise TypeError(f"{key} is {value!r}")
    return value
