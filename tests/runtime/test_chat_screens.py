"""What a conversation looks like: real terminals of two sizes, a model that says what the test wants, kept screens."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from scripted_model import NEWLINE, Script, cut, write_scripted
from terminal import command, engine_of
from tmux import Tmux, check_screen

from hymoe.chat_templates import fallback

pytestmark = pytest.mark.engine

SIZES = [(80, 24), (200, 50)]
GREETING = """<think>
The user says hello. A greeting in return is polite, with an example of everything that a terminal has to lay out: a \
heading, a list, a table, a piece of code.
</think>
<answer>
# Greeting

Hello! **你好，世界。** This is `code`, and this is a paragraph that is long enough to be broken into two rows at least.

- one item
- another

| word | tokens |
|------|-------:|
| 你好  | 1 |

```python
def f(x):
    return x + 1
```
</answer>"""
CHINESE = (
    "<think>\n用户在问天气。\n</think>\n<answer>\n深圳今天多云，气温在二十五度左右，适合外出散步；傍晚可能有小雨，请带一把伞。\
晚上风会变大，气温下降，建议穿一件薄外套，尽量早点回家，路上注意安全。\n</answer>"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the conversation runs: a model with a short name, a file to send."""
    folder = tmp_path_factory.mktemp("chat")
    write_talking(folder / "m.gguf")
    (folder / "notes.txt").write_text("Buy milk. 买牛奶。\n" * 5, encoding="utf-8")
    return folder


def write_talking(model: Path, n_ctx: int = 4096) -> None:
    """Write the model that says what these tests read, with a context of so many tokens."""
    first = cut(GREETING)
    second = cut(CHINESE, taken=frozenset(first))
    third = cut("<think>\nShort, but is it?\n</think>\n<answer>\nIt", taken=frozenset([*first, *second]))
    scripts = [
        Script(first),
        Script(cut("No thought, and done.", taken=frozenset([*first, *second, *third])), after=NEWLINE),
        Script([" la", " li", " lu"], when="endless", then=" la"),
        Script(second, when="天气"),
        Script([*third, " is", " so", " far.", "\n</answer>"], when="doubt", doubts={" is": " was", " so": " thus"}),
    ]
    write_scripted(model, scripts, template=fallback(), trained=n_ctx)


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    columns, rows = request.param
    return columns, rows


def chat(folder: Path, size: tuple[int, int], *flags: object, env: dict[str, str] | None = None) -> Tmux:
    state = {"XDG_STATE_HOME": str(folder / "state"), **(env or {})}
    words = command("hy-chat", "m.gguf", "-q", "--threads", 1, *flags)
    # -q: what is told before the first question has a path in it.
    return Tmux(words, *size, cwd=folder, env=state)


@pytest.fixture
def kept(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def test_a_conversation(folder: Path, size: tuple[int, int], kept: str, llama_server: Path) -> None:
    with chat(folder, size) as terminal:
        terminal.expect("context 0/4096")
        terminal.type("Hello", "Enter")
        check_screen(f"{kept}/first-answer", terminal.expect("tok/s"))
        terminal.type("/thought", "Enter")
        check_screen(f"{kept}/thought-again", terminal.expect("a heading, a list"))
        terminal.type("深圳天气怎么样？", "Enter")
        check_screen(f"{kept}/chinese", terminal.expect("注意安全"))
        terminal.type("Do you doubt it?", "Enter")
        terminal.expect("It is so far.")
        terminal.type("/tokens", "Enter")
        check_screen(f"{kept}/tokens", terminal.expect("' thus' 2"))
        terminal.type("/tokens thought", "Enter")
        check_screen(f"{kept}/tokens-thought", terminal.expect("100.0 %  t?"))
        terminal.type("", "C-l")
        terminal.type("/regen", "Enter")
        check_screen(f"{kept}/regen", terminal.expect("It is so far.", times=3))
        terminal.type("", "C-l")
        terminal.type("/edit 2", "Enter")
        check_screen(f"{kept}/edit-offered", terminal.expect("change it"))
        terminal.type("", "C-u")
        terminal.type("Do you still doubt it?", "Enter")
        terminal.expect("It is so far.", times=4)
        terminal.type("/list", "Enter")
        check_screen(f"{kept}/edit", terminal.expect("2 Do you still"))


def test_files_and_many_lines(folder: Path, size: tuple[int, int], kept: str, llama_server: Path) -> None:
    with chat(folder, size, "--think", "off") as terminal:
        terminal.expect("context 0/4096")
        terminal.type("/fi")
        check_screen(f"{kept}/completion", terminal.expect("so does @PATH"))
        terminal.type("", "C-u")
        terminal.type("What is in @notes.txt and @nothing?", "Enter")
        terminal.expect("done.")
        terminal.type("/file m.gguf", "Enter")
        check_screen(f"{kept}/file", terminal.expect("expected a text file"))
        terminal.type("", "C-l")
        terminal.paste("one\ntwo")
        terminal.type("", "M-Enter")
        terminal.type("three", "C-j")
        terminal.type("four", "Enter")
        check_screen(f"{kept}/many-lines", terminal.expect("done.", times=2))
        terminal.type("", "C-d")
        terminal.expect("[exit status 0]")


def test_ctrl_c_and_what_is_typed_meanwhile(folder: Path, size: tuple[int, int], kept: str, llama_server: Path) -> None:
    with chat(folder, size) as terminal:
        terminal.expect("context 0/4096")
        terminal.type("Something endless", "Enter")
        terminal.expect_soon(" lu la", times=12)
        terminal.type("half a question", "C-c")
        terminal.expect("stopped")
        # The question may have scrolled away by then; tmux also keeps the first screen, which was cleared as a whole.
        shown = terminal.screen(scrolled=True)
        shown = shown[shown.rindex("> Something endless") :]
        assert shown.count("half a question") == 1
        check_screen(f"{kept}/ctrl-c", re.sub(r"(?m)^(( ?(la|li|lu)\b)+\n)+", "(la li lu …)\n", shown))
        terminal.type("", "C-c")
        terminal.type("/list", "Enter")
        terminal.expect("1 Something endless")


def test_another_width_in_mid_answer(tmp_path: Path, llama_server: Path) -> None:
    """What comes after fits the new width: no row is cut, no word is lost or shown twice."""
    write_talking(tmp_path / "m.gguf", n_ctx=32768)  # it talks until the new width is seen
    with chat(tmp_path, (80, 24)) as terminal:
        terminal.expect("context 0/32768")
        terminal.type("Something endless", "Enter")
        terminal.expect_soon("la li lu")
        terminal.resize(47, 20)
        # What was there when the size changed is laid out by the terminal; it must have scrolled away.
        terminal.expect_rows_of(44)  # fifteen words of the 46 columns
        terminal.type("", "C-c")
        shown = terminal.expect("stopped")
        *rows, stopped, _input, status = shown.splitlines()
        assert stopped == "stopped"
        assert status.startswith("context ")
        assert {len(row) for row in rows[:-1]} == {44}
        words = " ".join(rows).split()
        turn = words.index("la")
        assert words[turn:] == [("la", "li", "lu")[i % 3] for i in range(len(words) - turn)]


def test_a_full_context(folder: Path, size: tuple[int, int], kept: str, llama_server: Path) -> None:
    with chat(folder, size, "--ctx", 256, "--think", "off", "--system", "Be brief.") as terminal:
        terminal.expect("context 0/256")
        for n, question in enumerate(("one " * 20, "two " * 20, "three " * 12), 1):
            terminal.type(question, "Enter")
            terminal.expect("done.", times=n)
        check_screen(f"{kept}/context-full", terminal.expect("left out"))
        terminal.type("", "C-l")
        terminal.type("word " * 60, "Enter")
        check_screen(f"{kept}/question-too-long", terminal.expect("the question alone has"))


def test_a_server_that_is_lost(folder: Path, size: tuple[int, int], kept: str, llama_server: Path) -> None:
    with chat(folder, size, "--think", "off") as terminal:
        terminal.expect("context 0/4096")
        terminal.type("Hello", "Enter")
        terminal.expect("done.")
        os.kill(engine(terminal), signal.SIGKILL)
        terminal.type("Are you there?", "Enter")
        check_screen(f"{kept}/server-lost", terminal.expect("done.", times=2))
        assert engine(terminal)


def engine(terminal: Tmux) -> int:
    """The llama-server behind the hy-chat in the terminal."""
    for pid in Path(f"/proc/{terminal.pid}/task/{terminal.pid}/children").read_text().split():
        if found := engine_of(int(pid)):
            return found
    raise AssertionError("no engine")


def test_no_colour(folder: Path, kept: str, size: tuple[int, int], llama_server: Path) -> None:
    with chat(folder, size, env={"NO_COLOR": "1"}) as terminal:
        terminal.expect("context 0/4096")
        terminal.type("Hello", "Enter")
        check_screen(f"{kept}/no-color", terminal.expect("tok/s"))
        sequences = re.findall(r"\x1b\[([\d;]*)m", terminal.screen(styled=True))
        codes = {int(code) for sequence in sequences for code in sequence.split(";") if code}
    # Bold and dim are no colours; 30 to 49 and 90 to 107 are, but for 39 and 49, which say none.
    assert codes & {1, 2}
    assert not {code for code in codes - {39, 49} if 30 <= code < 50 or code >= 90}
