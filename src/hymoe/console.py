"""The one module that prints.

Results go to stdout; status, progress and errors go to stderr. Bars and colour appear only on a
terminal (and never with NO_COLOR); elsewhere progress is a plain line every few seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, TextIO

from hymoe import sizes
from hymoe.errors import HyError

if TYPE_CHECKING:
    import typer
    from rich.console import Console, RenderableType

PLAIN_PROGRESS_SECONDS = 5.0
WIDEST = 1000  # columns

_verbosity = 0
_drawing: Console | None = None  # what a bar or a line at the foot is drawn on: other lines go above it


class Tick(Protocol):
    """What a progress context hands out: call it with the amount of work just finished."""

    def __call__(self, amount: float, /) -> None:
        """Report `amount` more units done."""


def set_verbosity(*, quiet: bool = False, verbose: bool = False) -> None:
    """Choose what stderr shows: errors and warnings only, the usual, or details as well."""
    global _verbosity  # noqa: PLW0603 - one process, one console
    _verbosity = -1 if quiet else 1 if verbose else 0


def result(text: str = "", *, end: str = "\n") -> None:
    """Write to stdout: what the command was asked for."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def table(renderable: RenderableType, *, whole: bool = False) -> None:
    """Write a rich table (or any renderable) to stdout.

    whole: where the terminal is narrower let it break lines, instead of leaving out parts of numbers and names.
    """
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    if whole:
        wanted = console.measure(renderable, options=console.options.update(max_width=WIDEST)).maximum
        console.width = max(console.width, wanted)
    console.print(renderable)


def status(text: str) -> None:
    """Write a line to stderr unless -q."""
    if _verbosity >= 0:
        _err(text)


def detail(text: str) -> None:
    """Write a line to stderr with -v only."""
    if _verbosity > 0:
        _err(text)


def warn(text: str) -> None:
    """Write a warning to stderr, -q or not."""
    _err(f"warning: {text}", style="yellow")


def error(text: str) -> None:
    """Write an error to stderr."""
    _err(f"error: {text}", style="bold red")


def terminal() -> TextIO:
    """Give stdout to a program that draws on it itself, with cursor movements."""
    return sys.stdout


def dim(text: str) -> str:
    """Give `text` dimmed where stdout is a terminal with colour, else unchanged."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    return f"\x1b[2m{text}\x1b[0m" if console.color_system and not console.no_color else text


@contextmanager
def progress(label: str, total: float, *, unit: str = "B", done: float = 0.0) -> Iterator[Tick]:
    """Show progress of `total` units until the block ends: "B" prints as bytes, "%" as percent, others by name.

    done: units that were there before.
    """
    if _verbosity < 0:
        yield lambda _amount: None
    elif can_draw():
        with _bar(label, total, unit, done) as tick:
            yield tick
    else:
        yield _plain(label, total, unit, done)


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Keep one line at the foot of the terminal: call what is given with its new text. Elsewhere nothing is shown."""
    if not can_draw():
        yield lambda _text: None
        return
    from rich.live import Live
    from rich.text import Text

    console = _stderr()
    with Live(console=console, auto_refresh=False, transient=True) as live, _drawing_on(console):
        yield lambda text: live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)


def can_draw() -> bool:
    """Whether stderr is a terminal on which lines can be drawn again, and is to be used (no -q)."""
    return _verbosity >= 0 and sys.stderr.isatty() and not _stderr().is_dumb_terminal


def format_bytes(n: float) -> str:
    """Write a byte count as people read it: 1536 -> "1.5 KB" (powers of 1000, as disks and downloads count)."""
    for suffix in ("B", "KB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {suffix}" if suffix == "B" else f"{n:.1f} {suffix}"
        n /= 1000
    return f"{n:.2f} TB"


def parse_size(text: str) -> int:
    """Read a size on a command line, as a typer option's parser."""
    from typer import BadParameter

    try:
        return sizes.parse_size(text)
    except ValueError as exc:
        raise BadParameter(str(exc)) from exc


def run(app: typer.Typer, argv: Sequence[str] | None, prog: str) -> int:
    """Run a typer app and give its exit status: 0, 1 with one `error:` line, 2 for usage, 130 for Ctrl-C."""
    import typer

    try:
        typer.main.get_command(app).main(args=None if argv is None else list(argv), prog_name=prog)
    except HyError as exc:
        error(str(exc))
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    return 0


def _err(text: str, style: str | None = None) -> None:
    from rich.text import Text

    (_drawing or _stderr()).print(Text(text, style=style or ""), soft_wrap=True)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def _drawing_on(console: Console) -> Iterator[None]:
    global _drawing  # noqa: PLW0603 - one process, one console
    _drawing = console
    try:
        yield
    finally:
        _drawing = None


@contextmanager
def _bar(label: str, total: float, unit: str, done: float) -> Iterator[Tick]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class _Rate(ProgressColumn):
        def render(self, task: Task) -> str:
            return f"{task.speed:.0f}/s" if task.speed else ""

    amounts: tuple[ProgressColumn, ...] = (TextColumn("{task.percentage:>3.0f} %"),)
    if unit == "B":
        amounts = (DownloadColumn(), TransferSpeedColumn())
    elif unit != "%":
        amounts = (*amounts, TextColumn("{task.completed:.0f} of {task.total:.0f} " + unit), _Rate())
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    console = _stderr()
    with Progress(*columns, console=console, transient=True) as bar, _drawing_on(console):
        task = bar.add_task(label, total=total, completed=int(done))
        yield lambda amount: bar.advance(task, amount)


def _plain(label: str, total: float, unit: str, done: float) -> Callable[[float], None]:
    begun = last = time.monotonic()
    before = done

    def tick(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last < PLAIN_PROGRESS_SECONDS or done <= before:
            return
        last = now
        rate = (done - before) / (now - begun)
        shown = ""
        if unit == "B":
            shown = f"{format_bytes(done)} of {format_bytes(total)}, {format_bytes(rate)}/s, "
        elif unit != "%":
            shown = f"{done:.0f} of {total:.0f} {unit}, {rate:.0f}/s, "
        status(f"{label}: {100 * done / total:.0f} %, {shown}{(total - done) / rate:.0f} s left")

    return tick


def is_verbose() -> bool:
    """Whether details are shown (-v)."""
    return _verbosity > 0


def ask(prompt: str) -> str:
    """Read a line from the terminal, with editing; `prompt` goes to stderr where stdout is not the terminal.

    Raises EOFError at the end of the input and KeyboardInterrupt for Ctrl-C.
    """
    if sys.stdout.isatty():
        with suppress(ImportError):  # absent on Windows, whose terminal edits lines itself
            import readline  # noqa: F401 - input() finds it
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()
