"""What helps in typing: completion of commands and of @paths, and the history that outlives the program."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import platformdirs
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from hymoe import console
from hymoe.runtime.commands import COMMANDS
from hymoe.runtime.settings import SETTINGS
from hymoe.runtime.wrap import printable

MAX_PATHS = 50
MAX_KEPT = 20_000  # characters of a line in the history, which is read as a whole at each start
_PATH_COMMANDS = ("/file", "/save", "/load")
_MENTION = re.compile(r'(?:^|\s)@"?([^\s"]*)$')
_ARGUMENTS = {"/set": tuple(SETTINGS), "/think": ("on", "off", "budget", "default"), "/tokens": ("all", "thought")}


class ChatCompleter(Completer):
    """Completes a command at the start of the line, what may follow it, and paths behind @."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Give what may come at the cursor."""
        before = document.text_before_cursor
        name, space, argument = before.partition(" ")
        if mention := _MENTION.search(before):
            yield from _paths(mention[1])
        elif not before.startswith("/") or "\n" in before:
            return
        elif not space:
            for command, told in COMMANDS.items():
                if command.startswith(name):
                    yield Completion(command, -len(name), display_meta=told.what)
        elif name in _PATH_COMMANDS:
            yield from _paths(argument)
        else:
            words = _ARGUMENTS.get(name, ())
            yield from (Completion(word, -len(argument)) for word in words if word.startswith(argument))


def _paths(begun: str) -> Iterator[Completion]:
    folder, _, name = begun.rpartition("/")
    try:
        where = Path(f"{folder}/" if "/" in begun else ".").expanduser()
        found = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(where))
    except (OSError, RuntimeError, ValueError):
        return
    shown = [entry for entry in found if entry.startswith(name) and (name or not entry.startswith("."))]
    yield from (Completion(entry, -len(name)) for entry in shown[:MAX_PATHS])


def open_history() -> History:
    """Give what was typed before, kept in a file that only its owner can read; where none can be, of this run alone."""
    path = platformdirs.user_state_path("hymoe") / "chat-history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError as exc:
        console.warn(f"{path}: {exc.strerror}; what you type is not kept")
        return InMemoryHistory()
    return PrivateHistory(str(path))


class PrivateHistory(FileHistory):
    """Keeps what is typed, but no line that begins with a space, as shells do it, and nothing very long."""

    def store_string(self, string: str) -> None:
        """Write a line to the file; that it cannot be written must not end a conversation."""
        if not string.startswith(" ") and len(string) <= MAX_KEPT:
            with suppress(OSError):
                super().store_string(printable(string))
