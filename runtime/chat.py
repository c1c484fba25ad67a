"""Asking and answering: one conversation, the server that answers, and the display that shows it, kept apart.

What can go wrong on the way is met here: a full context, a lost server, an answer that is stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

from rich.text import Text

from hymoe.errors import HyError
from hymoe.runtime import attachments, transcript
from hymoe.runtime.client import Client, LostServerError
from hymoe.runtime.conversation import Answer, Attachment, Conversation, Exchange
from hymoe.runtime.settings import Settings
from hymoe.runtime.stream import ChatStream, ContextFullError, Piece, Progress

N_ALTERNATIVES = 5
# Of a context: what an answer must have before it begins, and how full it is after the oldest exchanges are left out.
# Leaving out more than needed at once means that the whole prompt is read again once in a while, not at every question.
RESERVED, MAX_RESERVED, REFILLED = 0.2, 2048, 0.5
BYTES_PER_TOKEN = 3  # to guess a question's length before the server counts it
KV_SUFFIX = ".kv"


class Display(Protocol):
    """Where a conversation is shown."""

    def note(self, text: str) -> None:
        """Show a line about what happened."""

    def error(self, text: str) -> None:
        """Show what went wrong."""

    def say(self, text: str | Text) -> None:
        """Show what a command was asked for."""

    def begin(self, answer: Answer) -> None:
        """Make ready for an answer; it grows as `show` is called."""

    def show(self, piece: Piece | Progress, answer: Answer) -> None:
        """Show a piece of the answer, which is in `answer` already."""

    def end(self, answer: Answer) -> None:
        """Show what is left of it."""

    def offer(self, text: str) -> bool:
        """Put a text where the user can change and send it; False where there is no such place."""

    def copy(self, text: str) -> bool:
        """Put a text on the clipboard of the user's terminal; False where there is none."""


class Host(Protocol):
    """Who runs the server."""

    client: Client
    n_ctx: int | None
    model: dict[str, Any]  # what tells this model file from another; for /save
    defaults: dict[str, Any]  # the server's own sampling
    is_llama_server: bool

    async def recover(self, say: Callable[[str], None]) -> None:
        """Bring a lost server back, and say in a line what is done. Raises ServerError where it cannot be."""

    async def save_kv(self, path: Path) -> int:
        """Write what the server has read to `path` and give the number of tokens. Raises HyError."""

    async def load_kv(self, path: Path) -> int:
        """The other way round."""


class Chat:
    """One conversation. `fields` are added to each request."""

    def __init__(
        self, host: Host, display: Display, conversation: Conversation, settings: Settings, fields: dict[str, Any]
    ) -> None:
        self.host = host
        self.display = display
        self.conversation = conversation
        self.settings = settings
        self.files: list[Attachment] = []  # that go with the next question
        self.editing: int | None = None  # the exchange that the next question takes the place of
        self._fields = fields

    @property
    def last(self) -> Answer:
        """The last answer. Raises HyError where there is none."""
        if not self.conversation.exchanges:
            raise HyError("there is no answer yet")
        return self.conversation.exchanges[-1].answer

    def used(self) -> int:
        """Give how many tokens of the context the conversation takes, as far as it is known."""
        if not self.conversation.exchanges:
            return 0
        answer = self.conversation.exchanges[-1].answer
        return tokens_of(answer) - answer.thought_tokens

    async def ask(self, question: str) -> None:
        """Ask and show the answer; the files that the question mentions go with it.

        Both join the conversation when the answer is complete, or stopped (asyncio.CancelledError passes through).
        After an error neither does, and the question is offered again. Raises HyError.
        """
        try:
            mentioned, missing = attachments.mentioned(question)
        except HyError:
            self.display.offer(question)
            raise
        for name in missing:
            self.display.note(f"no file {name}: sent as it stands")
        files = (*self.files, *mentioned)
        for file in mentioned:
            await self._tell_size(file)
        number, self.editing = self.editing, None
        if number is not None:
            files = files or self.conversation.exchanges[number - 1].files
        try:
            await self._ask_and_keep(Exchange(question, files), number)
        except HyError:
            self.editing = number
            raise

    async def ask_once(self, prompt: str) -> Answer:
        """Ask as a script wants it: an @ is an @, and what goes wrong is raised and not mended. Raises HyError."""
        exchange = Exchange(prompt, tuple(self.files))
        await self._stream(exchange)
        self._say_how_it_ended(exchange.answer)
        return exchange.answer

    async def ask_again(self) -> None:
        """Ask the last question once more, in place of its answer. Raises HyError."""
        self.last  # noqa: B018 - raises where there is none
        self.editing = None
        last = self.conversation.exchanges[-1]
        await self._ask_and_keep(Exchange(last.question, last.files), len(self.conversation.exchanges))

    async def attach(self, path: str) -> None:
        """Let a file go with the next question. Raises HyError."""
        file = attachments.read_file(path)
        self.files.append(file)
        await self._tell_size(file)

    async def save(self, path: Path) -> None:
        """Write the conversation to a file, and what the server has read of it beside that. Raises HyError."""
        settings = self.settings
        extra: dict[str, Any] = {"model": self.host.model, "think": settings.thinking(), "sampling": settings.values}
        transcript.write(path, transcript.Transcript(self.conversation, extra))
        beside = path.with_name(path.name + KV_SUFFIX)
        try:
            n_tokens = await self.host.save_kv(beside)
        except HyError as exc:
            self.display.note(f"{path}: saved; what the server has read is not: {exc}")
        else:
            self.display.note(f"{path}: saved; {beside.name} beside it keeps {n_tokens} tokens that were read")

    async def load(self, path: Path) -> None:
        """Go on with a saved conversation. Raises HyError; the present one stays then."""
        loaded = transcript.read(path)
        settings = Settings.restored(loaded.settings, str(path))
        self.conversation, self.settings, self.editing, self.files = loaded.conversation, settings, None, []
        self.display.note(f"{path}: {len(self.conversation.exchanges)} exchanges")
        beside = path.with_name(path.name + KV_SUFFIX)
        if beside.exists():
            await self._load_kv(beside, loaded.settings.get("model"))

    async def _load_kv(self, path: Path, model: object) -> None:
        if self.host.model and model != self.host.model:
            self.display.note(f"{path.name} belongs to another model: ignored; the conversation is read again")
            return
        try:
            n_tokens = await self.host.load_kv(path)
        except HyError as exc:
            self.display.note(f"{path.name}: ignored; the conversation is read again ({exc})")
        else:
            self.display.note(f"{path.name}: {n_tokens} tokens need not be read again")

    async def _tell_size(self, file: Attachment) -> None:
        n_tokens = await self.host.client.count_tokens(file.text)
        size = f"about {len(file.text.encode()) // BYTES_PER_TOKEN}" if n_tokens is None else str(n_tokens)
        self.display.note(f"{file.name}: {size} tokens, goes with the question")

    async def _ask_and_keep(self, exchange: Exchange, number: int | None) -> None:
        """Ask, and keep the exchange, in place of exchange `number` and what followed it; after an error they stay."""
        talk = self.conversation
        n_left_out = talk.n_left_out
        taken = talk.rewind(number) if number is not None else []
        try:
            await self._ask(exchange)
        except asyncio.CancelledError:
            exchange.answer.reason = "stopped"
            if taken and not exchange.answer.text:
                # Nothing is no better than the answer that was there.
                talk.exchanges += taken
                talk.n_left_out = n_left_out
            else:
                self._keep(exchange)
            self.display.note("stopped")
            raise
        except HyError:
            talk.exchanges += taken
            talk.n_left_out = n_left_out
            self.display.offer(exchange.question)
            raise
        self._keep(exchange)
        self._say_how_it_ended(exchange.answer)

    def _keep(self, exchange: Exchange) -> None:
        self.conversation.exchanges.append(exchange)
        # A file that was attached while the answer came goes with the next question.
        self.files = [file for file in self.files if not any(file is sent for sent in exchange.files)]

    async def _ask(self, exchange: Exchange) -> None:
        """Ask until an answer is complete: after less where the context is full, again where the server was lost."""
        self._make_room(exchange)
        lost = False
        while True:
            try:
                await self._stream(exchange)
            except ContextFullError as exc:
                room = int(REFILLED * (exc.n_ctx or exc.n_tokens))
                if not self._leave_out(exchange, exc.n_tokens, room):
                    raise _too_long(exc) from exc
            except LostServerError:
                if lost:
                    raise
                lost = True
                await self.host.recover(self.display.note)
            else:
                return

    async def _stream(self, exchange: Exchange) -> None:
        """Ask once; `exchange.answer` grows as the answer comes."""
        answer = exchange.answer = Answer()
        stream = ChatStream()
        messages = self.conversation.messages(exchange.question, exchange.files)
        begun = time.monotonic()
        self.display.begin(answer)
        try:
            fields = self._fields | self.settings.fields()
            async with aclosing(self.host.client.chat(messages, fields, stream)) as pieces:
                async for piece in pieces:
                    answer.timings, answer.usage, answer.tokens = stream.timings, stream.usage, stream.tokens
                    if isinstance(piece, Piece):
                        begun = begun if answer.thought else time.monotonic()
                        _take(answer, piece, time.monotonic() - begun)
                    self.display.show(piece, answer)
        finally:
            answer.timings, answer.usage, answer.tokens = stream.timings, stream.usage, stream.tokens
            answer.reason = stream.reason
            self.display.end(answer)

    def _make_room(self, exchange: Exchange) -> None:
        """Leave out what leaves too little for an answer, as far as the numbers of the last answer tell."""
        n_ctx, talk = self.host.n_ctx, self.conversation
        if not n_ctx or talk.n_left_out >= len(talk.exchanges) or not self.used():
            return
        asked = sum(len(text.encode()) for text in (exchange.question, *(file.text for file in exchange.files)))
        n_tokens = self.used() + asked // BYTES_PER_TOKEN
        if n_tokens + min(RESERVED * n_ctx, MAX_RESERVED) > n_ctx:
            self._leave_out(exchange, n_tokens, int(REFILLED * n_ctx))

    def _leave_out(self, exchange: Exchange, n_tokens: int, room: int) -> int:
        n = self.conversation.leave_out(exchange.question, exchange.files, n_tokens, room)
        if n:
            oldest = "the oldest exchange is" if n == 1 else f"the {n} oldest exchanges are"
            self.display.note(f"context full ({n_tokens} tokens): {oldest} left out, the rest is read again")
        return n

    def _say_how_it_ended(self, answer: Answer) -> None:
        if answer.reason != "length":
            return
        limit = self.settings.values.get("max_tokens")
        limited = limit is not None and answer.timings.get("predicted_n", 0) >= limit
        told = "cut at max_tokens" if limited else "cut: the context is full; the next question makes room"
        self.display.note(told)


def _take(answer: Answer, piece: Piece, seconds: float) -> None:
    """Add a piece; `seconds` since the first one."""
    if piece.kind == "text":
        answer.text += piece.text
        return
    answer.thought += piece.text
    answer.thought_seconds = seconds
    marked = sum(token.is_thought for token in answer.tokens)
    answer.thought_tokens = max(answer.thought_tokens + 1, marked)


def tokens_of(answer: Answer) -> int:
    """Give the tokens of an answer and everything before it; 0 where the server did not say."""
    told = answer.usage.get("prompt_tokens", 0) + answer.usage.get("completion_tokens", 0)
    timings = answer.timings
    return int(told or sum(timings.get(key, 0) for key in ("cache_n", "prompt_n", "predicted_n")))


def _too_long(exc: ContextFullError) -> ContextFullError:
    line = f"context full: the question alone has {exc.n_tokens} tokens, the server holds {exc.n_ctx}"
    return ContextFullError(f"{line}; a larger --ctx holds more", exc.n_tokens, exc.n_ctx)
