"""A conversation on the terminal: history, streaming, and what Ctrl-C and errors do to them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import closing

from hymoe import console
from hymoe.errors import ServerError
from hymoe.runtime.client import Client, Message
from hymoe.runtime.process import waking
from hymoe.runtime.stream import ChatStream, Piece

HELP = """\
/reset  forget the conversation, keep the system prompt
/exit   leave (Ctrl-D too)
/help   this list
Ctrl-C stops an answer; what has come of it stays in the conversation.
/think or /no_think before a question goes to the model: with or without a thought first."""

# Words for the model that look like commands of ours.
MODEL_WORDS = ("/think", "/no_think")

# Control characters of a model's text could move the cursor or retitle the window.
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)))


class Chat:
    """One conversation with a server. `system` opens it; `max_tokens` limits each answer."""

    def __init__(self, client: Client, *, system: str | None = None, max_tokens: int | None = None) -> None:
        self._client = client
        self._max_tokens = max_tokens
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._opening)

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.messages = list(self._opening)

    def ask(self, prompt: str) -> str:
        """Stream the answer to stdout and give it back.

        Question and answer join the history together: after an error neither does, after Ctrl-C (which passes
        through) what has been shown of the answer does.
        """
        question = {"role": "user", "content": prompt}
        stream, screen = ChatStream(), Screen()
        pieces = self._client.chat([*self.messages, question], stream=stream, max_tokens=self._max_tokens)
        try:
            with closing(pieces):
                for piece in pieces:
                    screen.show(piece)
        except KeyboardInterrupt:
            self._remember(question, screen.text)
            raise
        finally:
            screen.end()
        self._remember(question, screen.text)
        self._say_how_it_ended(stream)
        return screen.text

    def _remember(self, question: Message, answer: str) -> None:
        if answer:
            self.messages += [question, {"role": "assistant", "content": answer}]

    def _say_how_it_ended(self, stream: ChatStream) -> None:
        n_tokens = int(stream.timings.get("predicted_n", 0))
        if stream.reason == "length":
            limited = self._max_tokens is not None and n_tokens >= self._max_tokens
            console.status("cut at --max-tokens" if limited else "cut: the context is full; /reset starts over")
        if n_tokens:
            console.detail(f"{n_tokens} tokens, {stream.timings.get('predicted_per_second', 0):.1f} tokens/s")


class Screen:
    """Where an answer goes: text to stdout; thoughts too, dimmed, but only where stdout is a terminal."""

    def __init__(self) -> None:
        self.text = ""
        self._on_terminal = sys.stdout.isatty()
        self._kind = ""
        self._column_is_zero = True

    def show(self, piece: Piece) -> None:
        """Show one piece."""
        if piece.kind == "text":
            self.text += piece.text
        elif not self._on_terminal:
            return
        text = piece.text.translate(_CONTROLS) if self._on_terminal else piece.text
        if not text:
            return
        if piece.kind != self._kind:
            self._switch(piece.kind)
        self._column_is_zero = text.endswith("\n")
        console.result(console.dim(text) if piece.kind == "thought" else text, end="")

    def _switch(self, kind: str) -> None:
        """Set a thought off from the answer: by a blank line, and by a word where there is no colour to dim it."""
        if self._kind:
            self.end()
            console.result()
        self._kind = kind
        if kind == "thought" and not console.dim(" ").strip():
            console.result("[thinking] ", end="")

    def end(self) -> None:
        """End the last line."""
        if not self._column_is_zero:
            self._column_is_zero = True
            console.result()


def repl(chat: Chat) -> None:
    """Ask and answer until Ctrl-D or /exit; errors of the server are shown and survived."""
    console.status("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            with waking():
                line = console.ask("> ").strip()
        except EOFError:
            console.status("")
            return
        except KeyboardInterrupt:
            console.status("\nCtrl-D or /exit leaves")
            continue
        if line in ("/exit", "/quit"):
            return
        if line in _COMMANDS:
            _COMMANDS[line](chat)
        elif re.fullmatch(r"/[a-z_]+", line) and line not in MODEL_WORDS:
            console.status(f"unknown command {line}; /help lists them")
        elif line:
            _ask_and_survive(chat, line)


def _ask_and_survive(chat: Chat, line: str) -> None:
    try:
        chat.ask(line)
    except KeyboardInterrupt:
        console.status("stopped")
    except ServerError as exc:
        console.error(str(exc))


def _reset(chat: Chat) -> None:
    chat.reset()
    console.status("the conversation is forgotten")


_COMMANDS: dict[str, Callable[[Chat], None]] = {"/reset": _reset, "/help": lambda _chat: console.status(HELP)}
