"""Markdown as it streams: what is printed is printed once, and says the same however the text was cut."""

from __future__ import annotations

import random
import re

import pytest
from rich.cells import cell_len
from rich.color import ColorSystem
from rich.text import Text

from hymoe.runtime.answer_view import AnswerView
from hymoe.runtime.inline import inline
from hymoe.runtime.markdown import MarkdownStream
from hymoe.runtime.stream import Piece, Progress
from hymoe.runtime.wrap import Ink, harmless, wrap

PLAIN = Ink(None)

TEXT = """# Title
Hello **bold** and `code`, *italic* but 2*3*4 and snake_case_x.

- an item that is long enough to be broken into several rows
  - nested
12. twelve

| a | b |
|---|--:|
| 1 | 22 |

```python
x = "a string"

```
> quoted
---
The end, [a link](http://x.y/z_z_z)."""

SHOWN = """Title
Hello bold and `code`, italic but 2*3*4
and snake_case_x.

• an item that is long enough to be
  broken into several rows
  • nested
12. twelve

a    b
──────
1   22

```python
x = "a string"

```
│ quoted
────────────────────────────────────────
The end, [a link](http://x.y/z_z_z).
"""


def streamed(text: str, size: int, *, width: int = 41, rows: int = 8) -> str:
    """Everything that is printed while `text` comes in chunks of `size` characters (0: of random ones)."""
    stream = MarkdownStream(PLAIN, width)
    random_ = random.Random(size)
    printed, at = "", 0
    while at < len(text):
        step = size or random_.randrange(1, 12)
        printed += stream.feed(text[at : at + step])
        done, live = stream.live(rows)
        assert len(live) <= rows + 3  # a blank line, and a table's head, come on top
        assert all(cell_len(row) < width for row in live)
        printed += done
        at += step
    return printed + stream.finish()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7, 10**6])
def test_the_same_rows_whatever_the_chunks(size: int) -> None:
    assert streamed(TEXT, size, rows=30) == SHOWN


def letters(text: str) -> str:
    return "".join(re.findall(r"\w", text))


WORDS = ["word", "**bold", "bold**", "`code", "code`", "*it", "it*", "中文，", "长长长长长长", "\n", "\n\n", "- ", "# "]


def words(random_: random.Random) -> str:
    return " ".join(f"{random_.choice(WORDS)}{n}" for n in range(random_.randrange(5, 300)))


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_lost_and_nothing_twice(seed: int) -> None:
    """Lines longer than the live rows are finished bit by bit; what is on the screen in the end is all there is."""
    text = words(random.Random(seed))
    printed = streamed(text, 0, width=30, rows=4)
    assert letters(printed) == letters(text)


@pytest.mark.parametrize("seed", range(40))
def test_another_width_at_any_time(seed: int) -> None:
    """Also within a line whose first rows are finished: what comes after fits, nothing is lost and nothing twice."""
    random_ = random.Random(seed)
    text = words(random_)
    stream = MarkdownStream(PLAIN, 30)
    printed = ""
    for at in range(0, len(text), 5):
        width = random_.choice((24, 30, 47))
        stream.resize(width)
        fed = stream.feed(text[at : at + 5])
        done, live = stream.live(4)
        assert all(cell_len(row) < width for row in [*f"{fed}{done}".splitlines(), *live])
        printed += fed + done
    assert letters(printed + stream.finish()) == letters(text)


def test_a_table_longer_than_the_screen_goes_on_under_its_head() -> None:
    table = "| n | m |\n|---|---|\n" + "".join(f"| {n} | {n * n} |\n" for n in range(30))
    printed = streamed(table, 3, rows=10)
    assert printed.count("n    m") > 1
    numbers = [int(found[1]) for found in re.finditer(r"(?m)^(\d+) ", printed)]
    assert numbers == list(range(30))


@pytest.mark.parametrize(
    ("source", "plain", "styled"),
    [
        ("a **b** c", "a b c", [("bold", "b")]),
        ("**中文。**后", "中文。后", [("bold", "中文。")]),
        ("***x***", "x", [("bold italic", "x")]),
        ("**a *b* c**", "a b c", [("italic", "b"), ("bold", "a b c")]),
        ("`a ** b` **c**", "a ** b c", [("cyan", "a ** b"), ("bold", "c")]),
        ("``a ` b``", "a ` b", [("cyan", "a ` b")]),
        ("2 * 3 * 4, a_b_c, 5**6", "2 * 3 * 4, a_b_c, 5**6", []),
        ("_x_ ~~y~~ \\*z\\*", "x y *z*", [("italic", "x"), ("strike", "y")]),
        ("**open and `open", "**open and `open", []),
    ],
)
def test_marks_inside_a_line(source: str, plain: str, styled: list[tuple[str, str]]) -> None:
    text = inline(source, open_ended=False)
    assert text.plain == plain
    assert [(str(span.style), text.plain[span.start : span.end]) for span in text.spans] == styled


def test_an_unfinished_mark_styles_the_rest() -> None:
    text = inline("a **b c", open_ended=True)
    assert (text.plain, [str(span.style) for span in text.spans]) == ("a b c", ["bold"])


def test_rows_break_where_chinese_allows() -> None:
    rows = wrap(Text("他说：“好的，我们走吧。”（完）English words"), 10)
    assert [row.plain for row in rows] == ["他说：“好", "的，我们走", "吧。”", "（完）", "English", "words"]
    assert all(cell_len(row.plain) <= 10 for row in rows)


@pytest.mark.parametrize("width", [2, 3, 10, 79])
def test_no_row_is_too_wide(width: int) -> None:
    text = "a\tb 中文 " * 20 + "x" * 200 + "👩‍🚀é" * 30
    for row in wrap(Text(text), width, indent="> ", hanging="  "):
        assert cell_len(row.plain) <= max(width, 4)


def test_control_characters_never_reach_the_terminal() -> None:
    evil = "".join(map(chr, [*range(32), *range(127, 160)]))
    assert harmless(f"a{evil}b") == "a\t\nb"
    view = AnswerView(Ink(ColorSystem.EIGHT_BIT), 40)
    shown = view.show(Piece("thought", f"x{evil}\x1b[2J"), 0.0, 1)
    shown += "".join(view.live(0.0, 5)[1])
    shown += view.show(Piece("text", f"```{evil}\x1b]0;title\x07\n| \x1b[2J |\n# \x9b2J\n"), 1.0, 1)
    shown += view.finish(2.0, 1)
    assert not set(re.sub(r"\x1b\[[\d;]*m", "", shown)) & (set(evil) - set("\t\n"))


def test_a_thought_is_live_and_folds_when_the_answer_begins() -> None:
    view = AnswerView(PLAIN, 40)
    assert view.show(Progress(100, 0, 40), 0.0, 0) == ""
    assert view.live(0.5, 10) == ("", ["reading 40 of 100 tokens"])
    for n in range(30):
        assert view.show(Piece("thought", f"line {n}\n"), 1.0 + n / 10, n) == ""
    done, live = view.live(5.0, 5)
    assert (done, live[0], len(live), live[-1]) == ("", "thinking, 4 s", 5, "  line 29")
    assert view.show(Piece("text", "\n"), 13.0, 30) == "thought for 12 s, 30 tokens\n"
    assert view.show(Piece("text", "Yes.\n"), 13.0, 30) == "Yes.\n"
    assert view.live(14.0, 5) == ("", [])
    assert view.finish(15.0, 30) == ""


def test_an_answer_that_ends_in_its_thought() -> None:
    view = AnswerView(PLAIN, 40)
    view.show(Piece("thought", "Hm"), 1.0, 1)
    assert view.finish(3.0, 7) == "thought for 2 s, 7 tokens\n"


@pytest.mark.parametrize("mark", ["_a ", "*a ", "**a ", "~~a "])
def test_marks_that_never_close_cost_no_more_than_their_length(mark: str) -> None:
    """A model that repeats itself must not stop the terminal: it was seconds for a line of 5000 marks."""
    text = mark * 20_000
    assert inline(text, open_ended=False).plain == text


def test_the_direction_of_writing_cannot_be_overridden() -> None:
    assert harmless("a\u202eb\u2066c\u2069 \x1b[2J\u200d") == "abc [2J\u200d"
