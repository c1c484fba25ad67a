"""What hy-chat does on a terminal beside its screens: the clipboard, bytes that are no text, signals, edits undone."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
from pathlib import Path

import pytest
from prompt_toolkit.data_structures import Size
from scripted_model import NEWLINE, Script, write_scripted
from terminal import Terminal, command, ends, engine_of

from hymoe.chat_templates import fallback
from hymoe.runtime import chat_terminal

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scripts = [
        Script(["It", " is", " so", " 好", "."], after=NEWLINE),
        Script([" la", " li", " lu"], when="endless", then=" la", after=NEWLINE),
    ]
    return write_scripted(tmp_path_factory.mktemp("model") / "m.gguf", scripts, template=fallback())


@pytest.fixture
def words(model: Path) -> list[str]:
    return command("hy-chat", model, "-q", "--threads", 1, "--think", "off")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}


def ask(terminal: Terminal, line: str, shown: str) -> None:
    terminal.type(f"{line}\r")
    terminal.expect(shown, after=len(terminal.screen))


def test_copying(words: list[str], env: dict[str, str], llama_server: Path) -> None:
    with Terminal(words, env=env) as terminal:
        terminal.expect("context 0")
        ask(terminal, "Hello", "write")
        packed = base64.b64encode("It is so 好.".encode()).decode()
        ask(terminal, "/copy", f"\x1b]52;c;{packed}\x07")
        ask(terminal, "/copy code", "an answer without a code block")
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_an_edit_whose_question_is_gone(words: list[str], env: dict[str, str], llama_server: Path) -> None:
    with Terminal(words, env=env) as terminal:
        terminal.expect("context 0")
        ask(terminal, "Hello", "It is so")
        ask(terminal, "/edit 1", "change it")
        terminal.type("\x15")
        ask(terminal, "/undo", "forgotten: Hello")
        ask(terminal, "Again", "It is so")
        ask(terminal, "/list", "1 Again")
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_what_is_no_file_or_no_text(words: list[str], env: dict[str, str], llama_server: Path) -> None:
    with Terminal(words, env=env) as terminal:
        terminal.expect("context 0")
        for line in ("/save /", "/load ~nobody-of-this-name/x", "/file ~nobody-of-this-name/x", "/load /dev/zero"):
            ask(terminal, line, "error: ")
        os.write(terminal.fd, b"bytes \xff\xfe\r")
        terminal.expect("It is so", after=len(terminal.screen))
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_a_file_goes_once(words: list[str], env: dict[str, str], tmp_path: Path, llama_server: Path) -> None:
    """It went with a question whose answer was stopped, so it does not go with the next one."""
    (tmp_path / "a.txt").write_text("x")
    with Terminal(words, env=env) as terminal:
        terminal.expect("context 0")
        ask(terminal, f"/file {tmp_path}/a.txt", "1 files")
        ask(terminal, "Something endless", "la li lu")
        terminal.type("\x03")
        at = terminal.expect("stopped", after=len(terminal.screen))
        ask(terminal, "/list", "1 Something endless")
        assert "1 files" not in terminal.screen[at:]
        terminal.type("\x04")
        assert terminal.wait() == 0


@pytest.mark.usefixtures("llama_server")
@pytest.mark.parametrize("question", ["", "Something endless"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal(question: str, number: signal.Signals, status: int, words: list[str], env: dict[str, str]) -> None:
    """The terminal is as it was: no input line waits, pastes come without brackets; and no engine is left."""
    with Terminal(words, env=env) as terminal:
        terminal.expect("context 0")
        if question:
            ask(terminal, question, "la li lu")
        engine = engine_of(terminal.pid)
        os.kill(terminal.pid, number)
        assert terminal.wait() == status
        assert "Traceback" not in terminal.screen
        assert terminal.screen.rindex("\x1b[?2004l") > terminal.screen.rindex("\x1b[?2004h")
    assert engine is not None
    assert ends(engine)


def test_leaving_at_the_moment_an_answer_ends(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    """The work must not take its own end for the answer's, and wait for another question for ever."""

    async def left() -> bool:
        async def obey(*_: object) -> None:
            answer = asyncio.current_task()
            assert answer is not None
            answer.add_done_callback(lambda _: work.cancel())

        monkeypatch.setattr(chat_terminal, "obey", obey)
        talk = chat_terminal.TerminalChat()
        monkeypatch.setattr(talk, "_chat", object())
        talk._queue.append("Hello")
        work = asyncio.create_task(talk._work())
        await asyncio.wait([work], timeout=5)
        return work.cancelled()

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    output = chat_terminal.HeldOutput(io.StringIO(), lambda: Size(24, 80))
    monkeypatch.setattr(chat_terminal, "held_output", lambda: output)
    assert asyncio.run(left())
