"""From the bytes of a streamed chat answer to pieces of text: pure, so that tests need no server.

A server sends events (https://html.spec.whatwg.org/multipage/server-sent-events.html) whose data is JSON in the form
of OpenAI's chat.completion.chunk, and `[DONE]` at the end. Chunks of bytes may be cut anywhere, inside a character too.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hymoe.errors import ServerError
from hymoe.runtime.conversation import Token

T = TypeVar("T", dict[str, object], list[object], str)


@dataclass(frozen=True)
class Piece:
    """A piece of an answer, or of the thought before it."""

    kind: Literal["thought", "text"]
    text: str


@dataclass(frozen=True)
class Progress:
    """How much of the prompt is read, in tokens; `cached` of them were read before."""

    total: int
    cached: int
    done: int


class ContextFullError(ServerError):
    """A request of `n_tokens` is more than the `n_ctx` that the server holds; 0 where it does not say."""

    def __init__(self, line: str, n_tokens: int, n_ctx: int) -> None:
        super().__init__(line)
        self.n_tokens = n_tokens
        self.n_ctx = n_ctx


# Where a delta carries text -> what that text is. `reasoning_content` is what servers that split thoughts send.
_DELTA_KINDS: dict[str, Literal["thought", "text"]] = {"reasoning_content": "thought", "content": "text"}
THOUGHT_LOGPROBS = "reasoning_content"


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
    """Route a chat answer: feed bytes, get pieces; the attributes say what else the server told."""

    def __init__(self) -> None:
        self._events = EventDecoder()
        self.finished = False  # [DONE] came
        self.reason = ""  # of the end, by the server's word: "stop", "length"
        self.timings: dict[str, float] = {}
        self.usage: dict[str, float] = {}
        self.tokens: list[Token] = []

    def feed(self, chunk: bytes) -> Iterator[Piece | Progress]:
        """Give the pieces that `chunk` completes.

        Raises ServerError for an error that the server sends in the stream, and for what is no chat stream.
        """
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

    def _pieces(self, event: object) -> list[Piece | Progress]:
        """Give the pieces of one event. Raises ServerError for an error, TypeError where a type is another."""
        if isinstance(event, dict) and event.get("error") is not None:
            raise refusal(event)
        timings = _field(event, "timings", dict)
        experts = _numbers(_field(timings, "expert_usage", dict))
        self.timings |= _numbers(timings) | {f"experts_{phase}": mean for phase, mean in experts.items()}
        self.usage |= _numbers(_field(event, "usage", dict))
        pieces: list[Piece | Progress] = []
        if progress := _numbers(_field(event, "prompt_progress", dict)):
            pieces.append(Progress(*(int(progress.get(key, 0)) for key in ("total", "cache", "processed"))))
        # The chunk that carries only usage has no choices.
        for choice in _field(event, "choices", list):
            delta = _field(choice, "delta", dict)
            texts = {kind: _field(delta, key, str) for key, kind in _DELTA_KINDS.items()}
            pieces += [Piece(kind, _printable(text)) for kind, text in texts.items() if text]
            self._take_tokens(choice, is_thought=bool(texts["thought"]) and not texts["text"])
            self.reason = _field(choice, "finish_reason", str) or self.reason
        return pieces

    def _take_tokens(self, choice: object, *, is_thought: bool) -> None:
        """Keep the probabilities of a chunk.

        Our server lists those of thought and answer apart, since text that it held back comes with a later delta; of
        another they are taken to be what the chunk's text is.
        """
        logprobs = _field(choice, "logprobs", dict)
        is_thought = is_thought and THOUGHT_LOGPROBS not in logprobs
        for key, thought in ((THOUGHT_LOGPROBS, True), ("content", is_thought)):
            for entry in _field(logprobs, key, list):
                others = tuple(_token(other) for other in _field(entry, "top_logprobs", list))
                self.tokens.append(Token(*_token(entry), alternatives=others, is_thought=thought))


def _token(entry: object) -> tuple[str, float]:
    logprob = entry.get("logprob") if isinstance(entry, dict) else None
    if not isinstance(logprob, int | float) or math.isnan(logprob):
        raise TypeError(f"logprob is {logprob!r}")
    return _printable(_field(entry, "token", str)), float(min(logprob, 0.0))


def _printable(text: str) -> str:
    # JSON can hold half of a surrogate pair, which nothing can print.
    return text.encode("utf-8", "replace").decode()


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    # A number beyond these bounds (or NaN) tells nobody anything, and cannot always be printed.
    return {key: n for key, n in values.items() if isinstance(n, int | float) and 0 <= n < 1e15}


def refusal(body: object) -> ServerError:
    """Give the error that an error body means."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return ServerError(f"the server refused: {error or body}")
    if error.get("type") == "exceed_context_size_error":
        counts = [error.get(key) for key in ("n_prompt_tokens", "n_ctx")]
        n_tokens, n_ctx = (n if isinstance(n, int) else 0 for n in counts)
        line = f"context full: the conversation has {n_tokens} tokens, the server holds {n_ctx}"
        return ContextFullError(f"{line}; /reset starts over, a larger --ctx holds more", n_tokens, n_ctx)
    return ServerError(f"the server refused: {error.get('message') or error}")


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
