"""The conversation on a terminal: finished text scrolls away above; below it stay the unfinished rows, the input and a
status line. The input is alive while an answer comes; what is sent meanwhile waits its turn.

Nothing that has scrolled is ever drawn again, and a frame goes out as one write, so nothing flickers.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prompt_toolkit.application import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import ANSI, StyleAndTextTuples, to_formatted_text
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import ConditionalContainer, HSplit, Layout, Window
from prompt_toolkit.layout.controls import BufferControl, FormattedTextControl
from prompt_toolkit.layout.dimension import Dimension
from prompt_toolkit.layout.menus import CompletionsMenu
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.widgets import SearchToolbar
from rich.color import ColorSystem
from rich.console import Console
from rich.text import Text

from hymoe import console
from hymoe.errors import HyError
from hymoe.runtime.answer_view import AnswerView
from hymoe.runtime.chat import Chat, tokens_of
from hymoe.runtime.chat_input import ChatCompleter, open_history
from hymoe.runtime.commands import Leave, obey
from hymoe.runtime.conversation import Answer
from hymoe.runtime.process import Terminated
from hymoe.runtime.stream import Piece, Progress
from hymoe.runtime.wrap import Ink, harmless, wrap

INTRODUCTION = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves"
FRAME_SECONDS = 1 / 60
TICK_SECONDS = 0.5  # the clock of a thought goes on while nothing comes
OTHER_ROWS = 4  # of the screen: status, an input line, and air
# Terminals refuse more in one sequence.
MAX_COPIED = 74994
_FIRST_COLUMN = re.compile(r"\S.*?\s{2,}|\s+\S+\s{2,}")


class HeldOutput(Vt100_Output):
    """A terminal that can hold back what is written, so that erasing, printing and drawing go out in one piece."""

    held = False

    def flush(self) -> None:
        """Write what is buffered, unless it is held."""
        if not self.held:
            super().flush()

    @property
    def responds_to_cpr(self) -> bool:
        """No: we need not know where on the screen we are, and slow links answer late, into the input."""
        return False


class TerminalDisplay:
    """Shows a conversation above the input of an Application that `attach` names."""

    def __init__(self, output: HeldOutput, ink: Ink) -> None:
        self._output = output
        self._ink = ink
        self._app: Application[None] | None = None
        self._buffer: Buffer | None = None
        self._view: AnswerView | None = None
        self._pending: list[str] = []
        self._frame: asyncio.TimerHandle | None = None
        self._drawn = 0.0
        self.answer = Answer()
        self.rows: list[str] = []

    def attach(self, app: Application[None], buffer: Buffer) -> None:
        """Draw above this application; `buffer` is its input."""
        self._app, self._buffer = app, buffer
        # The frame that draws the input again also releases what was printed above it.
        app.before_render += lambda _app: setattr(self._output, "held", False)

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self._output.get_size().columns

    def note(self, text: str) -> None:
        """Show a line about what happened."""
        if self._app is None:
            console.status(harmless(text))
        else:
            self.print(Text(text, "dim italic"))

    def error(self, text: str) -> None:
        """Show what went wrong."""
        self.print(Text(f"error: {text}", "bold red"))

    def say(self, text: str | Text) -> None:
        """Show what a command was asked for."""
        self.print(text if isinstance(text, Text) else Text(text))

    def print(self, text: Text, *, indent: str = "", hanging: str = "") -> None:
        """Print text above the input, its lines wrapped; the second column of a table stays one."""
        rows = []
        for line in text.split("\n", allow_blank=True):
            line.plain = harmless(line.plain)
            column = _FIRST_COLUMN.match(line.plain)
            further = " " * len(column[0]) if column and len(column[0]) <= self.width // 2 else hanging
            rows += wrap(line, self.width - 1, indent=indent, hanging=further)
            indent = hanging
        self._print("".join(f"{self._ink.write(row)}\n" for row in rows))

    def begin(self, answer: Answer) -> None:
        """Make ready for an answer."""
        self.answer = answer
        self._view = AnswerView(self._ink, self.width)

    def show(self, piece: Piece | Progress, answer: Answer) -> None:
        """Show one piece."""
        if self._view:
            n_tokens = answer.thought_tokens
            self._print(self._view.show(piece, time.monotonic(), n_tokens))

    def end(self, answer: Answer) -> None:
        """Show what is left of the answer."""
        if self._view:
            last = self._view.finish(time.monotonic(), answer.thought_tokens)
            self._view = None
            self._print(last)

    def offer(self, text: str) -> bool:
        """Put a text into the input, before what is typed there already."""
        if self._buffer is None:
            return False
        typed = self._buffer.text
        self._buffer.text = f"{text}\n{typed}" if typed else text
        self._buffer.cursor_position = len(self._buffer.text)
        return True

    def copy(self, text: str) -> bool:
        """Ask the terminal (OSC 52), over ssh the one at home, to put a text on its clipboard."""
        packed = base64.b64encode(text.encode()).decode()
        if len(packed) > MAX_COPIED:
            raise HyError("/copy", got=f"{len(text)} characters", expected="fewer: terminals refuse so many")
        self._output.write_raw(f"\x1b]52;c;{packed}\x07")
        self._output.flush()
        return True

    def tick(self) -> None:
        """Draw again: time has passed."""
        if self._view:
            self._print("")

    def _print(self, text: str) -> None:
        """Let finished text out with the next frame, which comes at once where the last one is old enough."""
        self._pending.append(text)
        if self._frame is None:
            wait = max(0.0, self._drawn + FRAME_SECONDS - time.monotonic())
            self._frame = asyncio.get_running_loop().call_later(wait, self._draw)

    def _draw(self) -> None:
        self._frame = None
        self._drawn = time.monotonic()
        self.rows = []
        if self._view:
            self._view.resize(self.width)
            done, self.rows = self._view.live(self._drawn, self._max_rows())
            self._pending.append(done)
        text = "".join(self._pending)
        self._pending.clear()
        if self._app is None or not self._app.is_running:
            self._output.write_raw(text.replace("\n", "\r\n"))
            self._output.flush()
            return
        if text:
            self._output.held = True
            self._app.renderer.erase()
            self._output.write_raw(text.replace("\n", "\r\n"))
        self._app.invalidate()

    def _max_rows(self) -> int:
        typed = self._buffer.document.line_count if self._buffer else 1
        rows = self._output.get_size().rows
        return max(rows - OTHER_ROWS - min(typed, rows // 3), 3)


class TerminalChat:
    """The terminal with its input; `run` holds the conversation."""

    def __init__(self) -> None:
        self._output = held_output()
        self.display = TerminalDisplay(self._output, _ink())
        self._chat: Chat | None = None
        self._queue: list[str] = []
        self._came = asyncio.Event()
        self._current: asyncio.Task[None] | None = None
        self._asked = False
        self._buffer = Buffer(
            completer=ChatCompleter(),
            complete_while_typing=Condition(self._completes),
            history=open_history(),
            multiline=True,
            accept_handler=self._accept,
        )
        self._app: Application[None] = Application(
            layout=self._layout(),
            key_bindings=self._keys(),
            output=self._output,
            color_depth=ColorDepth.MONOCHROME if Console().no_color else None,
        )

    async def run(self, chat: Chat) -> None:
        """Ask and answer until Ctrl-D or /exit; errors are shown and survived."""
        self._chat = chat
        console.status(INTRODUCTION)
        self.display.attach(self._app, self._buffer)
        # What others print (a restarted server's "still loading") goes above the input too.
        with patch_stdout(raw=True), self._ended_by_signals():
            tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._ticking())]
            try:
                await self._app.run_async(handle_sigint=False)
            finally:
                for task in [*tasks, *filter(None, [self._current])]:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def _ended_by_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGHUP end the application between two steps, and not in the middle of whatever runs."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        ours = {number: handler for number, handler in before.items() if callable(handler)}
        for number in ours:
            loop.add_signal_handler(number, self._end, Terminated(128 + number))
        try:
            yield
        finally:
            for number, handler in ours.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _end(self, reason: BaseException) -> None:
        if not self._app.is_done:
            self._app.exit(exception=reason)

    async def _work(self) -> None:
        """Do what was sent, one thing after the other."""
        while True:
            while not self._queue:
                self._came.clear()
                await self._came.wait()
            line = self._queue.pop(0)
            self._echo(line)
            self._current = asyncio.create_task(self._obey(line))
            try:
                await asyncio.shield(self._current)
            except asyncio.CancelledError:
                # We may be ended at the very moment at which the answer is: then its being done says nothing.
                if (ours := asyncio.current_task()) and ours.cancelling():
                    raise
            except Leave:
                self._app.exit()
                return
            except Exception as exc:
                self._app.exit(exception=exc)
                return
            finally:
                self._current = None

    async def _obey(self, line: str) -> None:
        assert self._chat is not None
        try:
            await obey(self._chat, line)
        except HyError as exc:
            self.display.error(str(exc))

    async def _ticking(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.display.tick()

    def _accept(self, buffer: Buffer) -> bool:
        line = buffer.text.strip()
        if line:
            self._queue.append(line)
            self._came.set()
        return False

    def _echo(self, line: str) -> None:
        """Show what was sent as it stands in the input, a blank line before it."""
        if self._asked:
            self.display.print(Text(""))
        self._asked = True
        self.display.print(Text(line, "bold"), indent="> ", hanging="  ")

    def _completes(self) -> bool:
        text = self._buffer.document.text_before_cursor
        return text.startswith("/") or bool(re.search(r"(?:^|\s)@\S*$", text))

    def _layout(self) -> Layout:
        search = SearchToolbar()
        typed = Window(
            BufferControl(self._buffer, search_buffer_control=search.control),
            wrap_lines=True,
            dont_extend_height=True,
            height=lambda: Dimension(min=1, max=max(self._output.get_size().rows // 3, 1)),
            get_line_prefix=lambda line, wrapped: "> " if line == wrapped == 0 else "  ",
        )
        live = Window(FormattedTextControl(self._live), dont_extend_height=True, wrap_lines=False)
        status = Window(FormattedTextControl(self._status), height=1, wrap_lines=False)
        parts = [
            ConditionalContainer(live, Condition(lambda: bool(self.display.rows))),
            ConditionalContainer(
                Window(FormattedTextControl(self._queued), height=1), Condition(lambda: bool(self._queue))
            ),
            typed,
            search.__pt_container__(),
            CompletionsMenu(max_height=6),
            status,
        ]
        return Layout(HSplit(parts), typed)

    def _live(self) -> StyleAndTextTuples:
        return to_formatted_text(ANSI("\n".join(self.display.rows)))

    def _queued(self) -> StyleAndTextTuples:
        return [("dim", f"{len(self._queue)} waiting: {' '.join(self._queue[0].split())}")]

    def _status(self) -> StyleAndTextTuples:
        assert self._chat is not None
        parts = status_parts(self._chat, self.display.answer, answering=self._current is not None)
        while len(" | ".join(parts)) >= self.display.width and len(parts) > 1:
            parts.pop()
        return [("dim", " | ".join(parts)[: self.display.width - 1])]

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        typing = Condition(lambda: self._app.current_buffer is self._buffer)
        bindings = {
            ("enter",): lambda _event: self._buffer.validate_and_handle(),
            ("escape", "enter"): lambda _event: self._buffer.newline(copy_margin=False),
            ("c-j",): lambda _event: self._buffer.newline(copy_margin=False),
            ("c-c",): self._stop,
            ("c-t",): self._show_thought,
        }
        for pressed, act in bindings.items():
            keys.add(*pressed, filter=typing)(act)
        keys.add("c-d", filter=typing & Condition(lambda: not self._buffer.text))(lambda _event: self._app.exit())
        return keys

    def _stop(self, _event: KeyPressEvent) -> None:
        """Stop the answer, and take back what waits behind it; without one, clear the input."""
        if self._current is not None:
            self._current.cancel()
            waiting, self._queue = "\n".join(self._queue), []
            if waiting:
                self.display.offer(waiting)
            return
        if not self._buffer.text:
            self.display.note("Ctrl-D or /exit leaves")
        if self._chat and self._chat.editing is not None:
            self._chat.editing = None
            self.display.note("left as it was")
        self._buffer.reset()

    def _show_thought(self, _event: KeyPressEvent) -> None:
        self._queue.append("/thought")
        self._came.set()


def status_parts(chat: Chat, answer: Answer, *, answering: bool) -> list[str]:
    """Say how full the context is, how fast the present answer or the last one is read and written, and what is set.

    Where they do not all fit on a line, the last ones can be missed.
    """
    timings = answer.timings
    used = tokens_of(answer) if answering else chat.used()
    share = f"/{chat.host.n_ctx} ({100 * used // chat.host.n_ctx} %)" if chat.host.n_ctx else ""
    parts = [f"context {used}{share}"]
    for what, key in (("read", "prompt_per_second"), ("write", "predicted_per_second")):
        if timings.get(key):
            speed = timings[key]
            parts.append(f"{what} {speed:.{1 if speed < 100 else 0}f} tok/s")
    if chat.settings.thinking() != "default":
        parts.append(f"think {chat.settings.thinking()}")
    if chat.editing is not None:
        parts.append(f"editing {chat.editing}")
    if chat.files:
        parts.append(f"{len(chat.files)} files")
    return parts if chat.conversation.exchanges else [*parts, "/help"]


def held_output() -> HeldOutput:
    """Give the terminal that stdout is."""
    output = HeldOutput.from_pty(console.terminal(), term=os.environ.get("TERM"))
    assert isinstance(output, HeldOutput)
    return output


def _ink() -> Ink:
    """Give what the terminal can show; NO_COLOR leaves bold and dim."""
    screen = Console(file=console.terminal())
    names = {"standard": ColorSystem.STANDARD, "256": ColorSystem.EIGHT_BIT, "truecolor": ColorSystem.TRUECOLOR}
    with suppress(KeyError):
        return Ink(names[screen.color_system or "standard"], no_colour=screen.no_color)
    return Ink(None)
