"""A conversation as data: what was asked and answered, what the server is sent of it, and how it is cut and edited.

Nothing here knows a server or a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Message = Mapping[str, str]


@dataclass(frozen=True)
class Token:
    """One token of an answer: its text, ln p, what else might have come as (text, ln p), and whether it is thought."""

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...] = ()
    is_thought: bool = False


@dataclass
class Answer:
    """What came of an answer, as far as it came.

    reason: the server's word ("stop", "length"), or "stopped" where Ctrl-C ended it. `timings` and `usage` are the
    server's own numbers: tokens, milliseconds, tokens per second.
    """

    text: str = ""
    thought: str = ""
    thought_tokens: int = 0
    thought_seconds: float = 0.0
    reason: str = ""
    tokens: list[Token] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Attachment:
    """A file that goes with a question."""

    name: str
    text: str


@dataclass
class Exchange:
    """A question as it was typed, the files that went with it, and the answer."""

    question: str
    files: tuple[Attachment, ...] = ()
    answer: Answer = field(default_factory=Answer)

    def messages(self) -> list[Message]:
        """Give what the server is sent: past thoughts are not."""
        return [
            {"role": "user", "content": user_content(self.question, self.files)},
            {"role": "assistant", "content": self.answer.text},
        ]


class Conversation:
    """Exchanges under one system prompt; the first `n_left_out` of them are kept but no longer sent."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.exchanges: list[Exchange] = []
        self.n_left_out = 0

    def messages(self, question: str, files: tuple[Attachment, ...] = ()) -> list[Message]:
        """Give the messages of a request that asks `question` next."""
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        past = [message for exchange in self._sent() for message in exchange.messages()]
        return [*opening, *past, {"role": "user", "content": user_content(question, files)}]

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.rewind(1)

    def rewind(self, number: int) -> list[Exchange]:
        """Take away exchange `number` (from 1) and what followed it; give what was taken."""
        taken = self.exchanges[number - 1 :]
        del self.exchanges[number - 1 :]
        self.n_left_out = min(self.n_left_out, len(self.exchanges))
        return taken

    def leave_out(self, question: str, files: tuple[Attachment, ...], n_tokens: int, room: int) -> int:
        """Leave out the oldest exchanges, at least one, so that a request of `n_tokens` has about `room`; count them.

        The share of a text in the tokens is taken for its share in the bytes. Where nothing is left to leave out, 0.
        """
        before = self.n_left_out
        per_byte = n_tokens / max(_size(self.messages(question, files)), 1)
        while self.n_left_out < len(self.exchanges):
            self.n_left_out += 1
            if _size(self.messages(question, files)) * per_byte <= room:
                break
        return self.n_left_out - before

    def _sent(self) -> list[Exchange]:
        # An exchange without an answer (stopped in mid-thought) would be two questions in a row.
        return [exchange for exchange in self.exchanges[self.n_left_out :] if exchange.answer.text]


def user_content(question: str, files: tuple[Attachment, ...]) -> str:
    """Give the text of a user's message: each file follows the question in a code block of its own."""
    return "\n\n".join([question, *(f"File {file.name}:\n{fenced(file)}" for file in files)])


def fenced(file: Attachment) -> str:
    """Give a file as a code block whose fence is longer than any inside."""
    fence = "```"
    while fence in file.text:
        fence += "`"
    _, dot, suffix = file.name.rpartition(".")
    newline = "" if file.text.endswith("\n") else "\n"
    return f"{fence}{suffix if dot and suffix.isalnum() else ''}\n{file.text}{newline}{fence}"


def _size(messages: list[Message]) -> int:
    return sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
