"""An answer as a terminal shows it, a pure function of what came and when: finished text, and live rows below it.

A thought is live only: its last rows show while it lasts, and one line stays of it.
"""

from __future__ import annotations

from rich.text import Text

from hymoe.runtime.markdown import MarkdownStream
from hymoe.runtime.stream import Piece, Progress
from hymoe.runtime.wrap import Ink, harmless, wrap

THOUGHT_ROWS = 8


class AnswerView:
    """Show pieces as they come. Times are seconds of one clock; `width` in cells."""

    def __init__(self, ink: Ink, width: int) -> None:
        self._ink = ink
        self._width = width
        self._body = MarkdownStream(ink, width)
        self._thought = ""
        self._thought_begun: float | None = None
        self._answering = False
        self._progress: Progress | None = None

    def show(self, piece: Piece | Progress, now: float, n_tokens: int) -> str:
        """Take a piece; give the text that it finishes. `n_tokens` of the answer have come so far."""
        if isinstance(piece, Progress):
            self._progress = piece
            return ""
        self._progress = None
        if piece.kind == "thought":
            self._thought_begun = now if self._thought_begun is None else self._thought_begun
            self._thought += harmless(piece.text)
            return ""
        done = "" if self._answering else self._fold(now, n_tokens)
        # What separates a thought from its answer is no part of either.
        text = piece.text if self._answering else piece.text.lstrip("\n")
        self._answering = self._answering or bool(text)
        return done + self._body.feed(text)

    def resize(self, width: int) -> None:
        """The terminal has another width now."""
        self._width = width
        self._body.resize(width)

    def finish(self, now: float, n_tokens: int) -> str:
        """Give what is left when the answer has ended."""
        return ("" if self._answering else self._fold(now, n_tokens)) + self._body.finish()

    def live(self, now: float, max_rows: int) -> tuple[str, list[str]]:
        """Give (text that is finished because it would not fit, the live rows, at most `max_rows`)."""
        if self._thought_begun is not None and not self._answering:
            return "", self._live_thought(now - self._thought_begun, min(max_rows, THOUGHT_ROWS))
        if self._progress:
            told = f"reading {self._progress.done} of {self._progress.total} tokens"
            return "", [self._ink.write(Text(told, "dim"))]
        done, rows = self._body.live(max_rows)
        return done, rows[-max_rows:]

    def _live_thought(self, seconds: float, n_rows: int) -> list[str]:
        rows = thought_rows(self._ink, self._thought[-n_rows * self._width :], self._width)
        return [self._ink.write(Text(f"thinking, {seconds:.0f} s", "dim italic")), *rows[-(n_rows - 1) :]]

    def _fold(self, now: float, n_tokens: int) -> str:
        """Give the line that stays of the thought, once."""
        if self._thought_begun is None:
            return ""
        seconds, self._thought_begun = now - self._thought_begun, None
        return self._ink.write(Text(folded(seconds, n_tokens), "dim italic")) + "\n"


def folded(seconds: float, n_tokens: int) -> str:
    """Say how long a thought was."""
    return f"thought for {seconds:.0f} s, {n_tokens} tokens"


def thought_rows(ink: Ink, thought: str, width: int) -> list[str]:
    """Give a thought's rows, dimmed."""
    lines = harmless(thought).strip("\n").split("\n")
    return [ink.write(row) for line in lines for row in wrap(Text(line, "dim"), width - 1, indent="  ", hanging="  ")]
