"""The engine's llama-imatrix as one resumable pass over a text.

While it runs, OUT.part holds the sums of whole chunks and OUT.part.json says what they were begun as. The tool saves
every quarter of a minute and when it is asked to stop; the same command goes on with the chunks that are missing.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final, TextIO

from hymoe import console
from hymoe.engine import environment, find
from hymoe.errors import EngineError, HyError, ModelFileError, OutputError, UnsupportedError
from hymoe.imatrix import files
from hymoe.imatrix.files import Imatrix

TOOL: Final = "llama-imatrix"
TAIL_LINES: Final = 200
# So that the tool itself never saves in the middle of a chunk.
NEVER: Final = str(2**31 - 1)
# How soon who presses Ctrl-C in a long chunk sees that it was heard.
LOOKS_S: Final = 0.2

_PLAN = re.compile(r"hymoe-imatrix: (\d+) tokens, (\d+) chunks")
_DONE = re.compile(r"hymoe-imatrix: done (\d+)")
_BAD_VALUE = re.compile(r"non-finite values detected in (\S+)")
_TOO_SHORT = re.compile(r"tokenizes to only (\d+) tokens")
_ERROR = re.compile(r"hymoe-imatrix: (cannot write .*)|\bE +(.*)|(error.*)", re.IGNORECASE)


@dataclass(frozen=True)
class Pass:
    """A text through a model.

    out: the file that is wanted in the end; `OUT.part…` lie beside it. n_chunks None: all of the text. extra: further
    arguments of llama-imatrix. identity: what decides the sums, by name, in words that a user knows.
    """

    model: Path
    text: str
    out: Path
    n_ctx: int
    n_chunks: int | None = None
    threads: int | None = None
    extra: tuple[str, ...] = ()
    label: str = "collecting"
    identity: Mapping[str, str] = field(default_factory=dict)

    @property
    def part(self) -> Path:
        """Where the tool saves."""
        return self.out.with_name(self.out.name + ".part")


@contextmanager
def run(todo: Pass, *, restart: bool) -> Iterator[Imatrix]:
    """Run the pass, or what an interruption left of it, and give its sums; what it saved goes after the block.

    Raises KeyboardInterrupt for Ctrl-C after the chunks so far are saved; OutputError for an unfinished pass of
    something else and for an output that another process works on; ModelFileError for NaN in the activations;
    UnsupportedError for a text of less than a chunk; EngineError for a tool that fails otherwise.
    """
    state_file = todo.part.with_name(todo.part.name + ".json")
    try:
        file = os.open(state_file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as exc:
        raise OutputError(f"{todo.out}: cannot be written", got=exc.strerror or exc) from exc
    with os.fdopen(file, "r+", encoding="utf-8") as state:
        try:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{todo.out}: another process is making it", fix="wait for it") from None
        n_total = _resumed(todo, state.read(), restart=restart)
        try:
            done = _n_done(todo)
            if n_total is None or done < n_total:
                _Tool(todo, done, partial(_note, state, todo)).run()
            yield files.read(todo.part)
            todo.part.unlink()
        finally:
            if not todo.part.exists():
                state_file.unlink(missing_ok=True)


def _note(state: TextIO, todo: Pass, n_total: int) -> None:
    """Write down what the pass was begun as; in place, since the lock is on this very file."""
    state.seek(0)
    state.write(json.dumps({"identity": dict(todo.identity), "chunks": n_total}))
    state.truncate()


def _resumed(todo: Pass, text: str, *, restart: bool) -> int | None:
    """Give the number of chunks of an unfinished pass of the same thing; None where there is none to go on with."""
    try:
        found = json.loads(text)
        identity, n_total = dict(found["identity"]), int(found["chunks"])
    except (ValueError, TypeError, KeyError):
        identity, n_total = {}, 0
    if restart or not n_total or not todo.part.exists():
        todo.part.unlink(missing_ok=True)
        return None
    for name, wanted in todo.identity.items():
        if identity.get(name) != wanted:
            raise OutputError(
                f"{todo.part} was begun with another {name}",
                got=wanted,
                expected=identity.get(name, "none"),
                fix="undo the change, or pass --restart to begin again",
            )
    return n_total


def _n_done(todo: Pass) -> int:
    if not todo.part.exists():
        return 0
    try:
        done = files.read(todo.part).n_chunks
    except ModelFileError as exc:
        console.warn(f"{exc}; beginning again")
        todo.part.unlink()
        return 0
    console.status(f"going on after {done} chunks")
    return done


class _Tool:
    """One run of llama-imatrix on the chunks that are missing, and what it says."""

    def __init__(self, todo: Pass, n_before: int, planned: Callable[[int], None]) -> None:
        self.todo = todo
        self.n_before = n_before
        self.planned = planned
        self.n_total = 0
        self.n_done = n_before
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.stopping = self.told = False

    def run(self) -> None:
        text = self.todo.part.with_name(self.todo.part.name + ".txt")
        try:
            try:
                text.write_text(self.todo.text, encoding="utf-8")
            except OSError as exc:
                raise OutputError(f"{text}: cannot be written", got=exc.strerror or exc) from exc
            self._run(self._command(text))
        finally:
            text.unlink(missing_ok=True)

    def _command(self, text: Path) -> list[str]:
        todo, n_ctx = self.todo, str(self.todo.n_ctx)
        command = [str(find().tool(TOOL)), "-m", str(todo.model), "-f", str(text), "-o", str(todo.part)]
        command += ["--output-format", "gguf", "--parse-special", "--no-ppl", "--output-frequency", NEVER]
        # One chunk a pass: progress, saves and Ctrl-C wait for no more.
        command += ["-c", n_ctx, "-b", n_ctx]
        # llama-imatrix ends with an assertion where a vocabulary wants an end token after every text.
        command += ["--override-kv", "tokenizer.ggml.add_eos_token=bool:false"]
        if self.n_before:
            command += ["--in-file", str(todo.part), "--chunk", str(self.n_before)]
        if todo.n_chunks is not None:
            command += ["--chunks", str(todo.n_chunks - self.n_before)]
        if todo.threads is not None:
            command += ["-t", str(todo.threads)]
        return [*command, *todo.extra]

    def _run(self, command: list[str]) -> None:
        # A session of its own: Ctrl-C in the terminal reaches us alone. Should we be killed, the next line ends it.
        with (
            subprocess.Popen(
                command,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
            self._asked_to_stop(process),
        ):
            try:
                self._follow(process)
            except BaseException:
                process.kill()
                raise
        # It may be asked before it can answer, while it loads.
        if self.stopping and process.returncode in (0, -signal.SIGTERM):
            console.status(f"{self.n_done} of {self.n_total or 'all'} chunks are kept; the same command goes on")
            raise KeyboardInterrupt
        if process.returncode:
            raise self._failure(process.returncode)

    @contextmanager
    def _asked_to_stop(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """The first Ctrl-C asks the tool to stop after its chunk, and interrupts nothing here."""
        usual = signal.getsignal(signal.SIGINT)
        if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
            yield
            return

        def asked(_number: int, _frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, usual)
            self.stopping = True
            process.terminate()

        signal.signal(signal.SIGINT, asked)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        with ExitStack() as shown:
            tick: console.Tick | None = None
            for line in self._lines(process):
                if found := _PLAN.search(line):
                    self.n_total = self.n_before + int(found[2])
                    self.planned(self.n_total)
                    n_ctx = self.todo.n_ctx
                    done, total = self.n_before * n_ctx, self.n_total * n_ctx
                    tick = shown.enter_context(console.progress(self.todo.label, total, unit="tokens", done=done))
                elif (found := _DONE.search(line)) and tick:
                    before, self.n_done = self.n_done, self.n_before + int(found[1])
                    tick((self.n_done - before) * self.todo.n_ctx)

    def _lines(self, process: subprocess.Popen[bytes]) -> Iterator[str]:
        """Give what the tool says until it ends."""
        rest = b""
        while raw := self._read(process):
            *lines, rest = (rest + raw).split(b"\n")
            yield from map(self._said, lines)
        if rest:
            yield self._said(rest)

    def _said(self, raw: bytes) -> str:
        line = raw.decode("utf-8", "replace").rstrip()
        self.tail.append(line)
        console.detail(line)
        return line

    def _read(self, process: subprocess.Popen[bytes]) -> bytes:
        """Wait for more; who asks it to stop sees at once that it will."""
        assert process.stdout
        while not select.select([process.stdout], [], [], LOOKS_S)[0]:
            if self.stopping and not self.told:
                console.status("stopping after this chunk; Ctrl-C again stops at once")
                self.told = True
        return os.read(process.stdout.fileno(), 1 << 16)

    def _failure(self, status: int) -> HyError:
        said = "\n".join(self.tail)
        if found := _BAD_VALUE.search(said):
            return ModelFileError(
                f"{self.todo.model}: NaN or infinity in what meets {found[1]}",
                fix="convert the model again; F16 weights overflow where BF16 ones do not",
            )
        if found := _TOO_SHORT.search(said):
            return UnsupportedError(
                "the text is too short",
                got=f"{found[1]} tokens",
                expected=f"{self.todo.n_ctx} or more, a chunk",
                fix="add text, or pass a smaller --ctx",
            )
        reasons = [next(filter(None, found.groups())) for line in self.tail if (found := _ERROR.search(line))]
        why = reasons[-1].strip() if reasons else f"exit status {status}"
        goes_on = "; the same command goes on" if self.todo.part.exists() else ""
        return EngineError(f"{TOOL} failed", got=why, fix=f"-v shows all it says{goes_on}")
