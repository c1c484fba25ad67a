"""From the bytes of a streamed chat answer to pieces of text: pure, so that tests need no server.

A server sends events (https://html.spec.whatwg.org/multipage/server-sent-events.html) whose data is JSON in the form
of OpenAI's chat.completion.chunk, and `[DONE]` at the end. Chunks of bytes may be cut anywhere, inside a character too.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hymoe.errors import ServerError


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
            yield from self._pieces(_parse(data))

    def _pieces(self, event: dict[str, Any]) -> Iterator[Piece]:
        if "error" in event:
            raise ServerError(error_text(event))
        self.timings |= event.get("timings") or {}
        # The chunk that carries only usage has no choices.
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            for key, kind in _DELTA_KINDS.items():
                if delta.get(key):
                    yield Piece(kind, delta[key])
            self.reason = choice.get("finish_reason") or self.reason


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


def _parse(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise ServerError(
            "the server's answer is no chat stream", got=repr(data[:60]), expected="JSON", fix="is this a llama-server?"
        )
    return event
