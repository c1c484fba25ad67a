"""A real terminal of a chosen size (tmux, on a server and socket of its own), and screens kept as text files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import pytest
from children import child

SECONDS = 15.0  # against hanging; says nothing about speed
SCREENS = Path(__file__).resolve().parent / "runtime" / "screens"
# What differs from run to run -> what is kept.
_NUMBERS = (
    (re.compile(r"[\d.]+ (tok(?:ens)?/s)"), r"N \1"),
    (re.compile(r"thought for \d+ s, \d+ tokens"), "thought for N s, N tokens"),
    (re.compile(r"context \d+/(\d+) \(\d+ %\)"), r"context N/\1 (N %)"),
    (re.compile(r"\b(\d)\d\.\d %"), r"\1N.N %"),
    (re.compile(r"http://127\.0\.0\.1:\d+"), "http://127.0.0.1:PORT"),
)


class Tmux:
    """A command in a terminal of `columns` by `rows`; leaving the block ends both."""

    def __init__(
        self, words: list[str], columns: int, rows: int, *, cwd: Path, env: Mapping[str, str] | None = None
    ) -> None:
        if not shutil.which("tmux"):
            pytest.skip("tmux is not installed")
        shown = "; ".join([shlex.join(words), 'echo "[exit status $?]"', "exec sleep 600"])
        # A screen that knows the usual sequences, whatever the developer's own settings are.
        clean = {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", **(env or {})}
        size = ["-x", str(columns), "-y", str(rows)]
        settings = [part for name, value in clean.items() for part in ("-e", f"{name}={value}")]
        with ExitStack() as undo:
            folder = undo.enter_context(TemporaryDirectory(prefix="hymoe-"))
            self._command = ["tmux", "-S", f"{folder}/socket", "-f", "/dev/null"]
            # Not a daemon, but a child that ends with the tests; what it runs is hung up on then.
            undo.enter_context(child([*self._command, "-D"]))
            self._begin("new-session", "-d", "-s", "t", *size, *settings, "-c", str(cwd), "sh", "-c", shown)
            undo.callback(self._tmux, "kill-server")
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._undo.close()

    @property
    def pid(self) -> int:
        """The process id of the shell that runs the command."""
        return int(self._tmux("display-message", "-p", "-t", "t", "#{pane_pid}"))

    def type(self, text: str, *keys: str) -> None:
        """Type `text`, then press keys by tmux's names ("Enter", "C-c")."""
        if text:
            self._tmux("send-keys", "-t", "t", "-l", "--", text)
        if keys:
            self._tmux("send-keys", "-t", "t", *keys)

    def paste(self, text: str) -> None:
        """Paste `text`, in brackets where the command has asked for it."""
        self._tmux("set-buffer", "--", text)
        self._tmux("paste-buffer", "-p", "-t", "t")

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size."""
        self._tmux("resize-window", "-t", "t", "-x", str(columns), "-y", str(rows))

    def expect_rows_of(self, width: int) -> None:
        """Wait until every row on the screen but the last three (those still change) is `width` wide."""
        deadline = time.monotonic() + SECONDS
        while {len(row) for row in self.screen().splitlines()[:-3]} != {width}:
            assert time.monotonic() < deadline, f"not all rows are {width} wide:\n{self.screen()}"
            time.sleep(0.03)

    def screen(self, *, styled: bool = False, scrolled: bool = False) -> str:
        """Give what is on the screen: also its escape sequences, also what has scrolled away."""
        flags = [*(["-e"] if styled else []), *(["-S", "-"] if scrolled else [])]
        return self._tmux("capture-pane", "-p", *flags, "-t", "t").rstrip("\n")

    def expect(self, text: str, *, times: int = 1) -> str:
        """Wait until `text` was shown so often, and give the screen."""
        self.expect_soon(text, times=times)
        return self.settled()

    def expect_soon(self, text: str, *, times: int = 1) -> None:
        """Wait until `text` was shown so often, whatever goes on."""
        deadline = time.monotonic() + SECONDS
        while self.screen(scrolled=True).count(text) < times:
            assert time.monotonic() < deadline, f"no {text!r} ({times} times):\n{self.screen(scrolled=True)}"
            time.sleep(0.03)

    def settled(self) -> str:
        """Give the screen when it has not changed for a moment."""
        deadline = time.monotonic() + SECONDS
        before = ""
        while (now := self.screen()) != before:
            assert time.monotonic() < deadline, f"never at rest:\n{now}"
            before = now
            time.sleep(0.25)
        return now

    def _begin(self, *words: str) -> None:
        """Give the first command, as soon as the server listens."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                self._tmux("-N", *words)  # -N: no other server
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    def _tmux(self, *words: str) -> str:
        command = [*self._command, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout


def check_screen(name: str, shown: str) -> None:
    """Compare a screen with the kept one; HYMOE_KEEP_SCREENS=1 keeps it instead, to be looked at and committed."""
    for pattern, kept in _NUMBERS:
        shown = pattern.sub(kept, shown)
    text = "\n".join(line.rstrip() for line in shown.splitlines()) + "\n"
    file = SCREENS / f"{name}.txt"
    if os.environ.get("HYMOE_KEEP_SCREENS"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"{name}: the screen is another:\n{text}"
