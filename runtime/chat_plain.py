"""A conversation as plain lines: for pipes, for terminals that know no sequences, and for one answer."""

from __future__ import annotations

import asyncio
import sys

from rich.text import Text

from hymoe import console
from hymoe.errors import HyError
from hymoe.runtime.chat import Chat
from hymoe.runtime.commands import Leave, obey
from hymoe.runtime.conversation import Answer
from hymoe.runtime.process import waking
from hymoe.runtime.stream import Piece, Progress
from hymoe.runtime.wrap import harmless

INTRODUCTION = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves"


class PlainDisplay:
    """Answers go to stdout as they come, all else to stderr; thoughts show, dimmed, only where stdout is a terminal."""

    def __init__(self) -> None:
        self._on_terminal = sys.stdout.isatty()
        self._kind = ""
        self._column_is_zero = True

    def note(self, text: str) -> None:
        """Show a line about what happened."""
        console.status(harmless(text))

    def error(self, text: str) -> None:
        """Show what went wrong."""
        console.error(harmless(text))

    def say(self, text: str | Text) -> None:
        """Show what a command was asked for."""
        console.status(harmless(text.plain if isinstance(text, Text) else text))

    def begin(self, answer: Answer) -> None:
        """Make ready for an answer."""
        self._kind = ""

    def show(self, piece: Piece | Progress, answer: Answer) -> None:
        """Show one piece."""
        if isinstance(piece, Progress) or (piece.kind == "thought" and not self._on_terminal):
            return
        text = harmless(piece.text) if self._on_terminal else piece.text
        if not text:
            return
        if piece.kind != self._kind:
            self._switch(piece.kind)
        self._column_is_zero = text.endswith("\n")
        console.result(console.dim(text) if piece.kind == "thought" else text, end="")

    def end(self, answer: Answer) -> None:
        """End the last line."""
        if not self._column_is_zero:
            self._column_is_zero = True
            console.result()
        if n_tokens := int(answer.timings.get("predicted_n", 0)):
            console.detail(f"{n_tokens} tokens, {answer.timings.get('predicted_per_second', 0):.1f} tokens/s")

    def offer(self, text: str) -> bool:
        """Say that there is no place for it."""
        return False

    def copy(self, text: str) -> bool:
        """Say that there is no clipboard."""
        return False

    def _switch(self, kind: str) -> None:
        """Set a thought off from the answer: by a blank line, and by a word where there is no colour to dim it."""
        if self._kind:
            if not self._column_is_zero:
                console.result()
            self._column_is_zero = True
            console.result()
        self._kind = kind
        if kind == "thought" and not console.dim(" ").strip():
            console.result("[thinking] ", end="")


class SilentDisplay(PlainDisplay):
    """Shows no answer: --json gives it as a whole."""

    def show(self, piece: Piece | Progress, answer: Answer) -> None:
        """Show nothing."""


def repl(chat: Chat, runner: asyncio.Runner) -> None:
    """Ask and answer until Ctrl-D or /exit; errors are shown and survived."""
    console.status(INTRODUCTION)
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
        try:
            if line:
                runner.run(obey(chat, line))
        except Leave:
            return
        except HyError as exc:
            console.error(str(exc))
        except KeyboardInterrupt:
            continue
