"""Markdown inside one line: code, bold, italic, struck out, links.

By CommonMark `**中文。**后` stays as it is because of the full stop; a model that writes Chinese means bold. Its
parsers also cannot say how a line looks whose end is still to come.
"""

from __future__ import annotations

import re

from rich.text import Text

CODE, LINK = "cyan", "underline"
# An emphasis mark opens before something that is no space, and closes behind something that is none; a single mark (or
# an underscore) inside a word is a character: 2*3*4, snake_case.
_TOKEN = re.compile(
    r"(?P<escape>\\[\\`*_~\[\]()#+\-.!|<>{}])"
    r"|(?P<code>`+)"
    r"|(?P<link>\[[^\[\]\n*`~]+\]\([^()\s]+\))"
    r"|(?P<mark>\*\*\*|\*\*|~~|(?<!\w)__|__(?!\w)|(?<!\w)_(?!_)|(?<!_)_(?!\w)|(?<![\w*])\*(?![*\s])|(?<![\s*])\*(?!\w))"
)
_STYLES = {"***": "bold italic", "**": "bold", "__": "bold", "~~": "strike", "*": "italic", "_": "italic"}


def inline(source: str, *, open_ended: bool, keep_code_marks: bool = False) -> Text:
    """Give a line as styled text.

    open_ended: a mark without its other half styles the rest of the line instead of standing there as it is: it is how
    an unfinished line looks best, and when the other half comes nothing moves. keep_code_marks: where colour cannot
    tell code, its marks stay.
    """
    text = Text()
    at = 0
    opened: dict[str, int] = {}
    closing = {} if open_ended else _last_closing(source)
    while found := _TOKEN.search(source, at):
        text.append(source[at : found.start()])
        at = found.end()
        if found["escape"]:
            text.append(found[0][1:])
        elif found["code"]:
            at = _code(text, source, found, open_ended=open_ended, keep_marks=keep_code_marks)
        elif found["link"]:
            text.append(found[0], LINK)
        else:
            has_end = open_ended or closing.get(found[0], -1) >= found.end()
            _mark(text, source, found, opened, has_end=has_end, open_ended=open_ended)
    text.append(source[at:])
    for mark, start in opened.items():
        text.stylize(_STYLES[mark], start)
    return text


def _code(text: Text, source: str, found: re.Match[str], *, open_ended: bool, keep_marks: bool) -> int:
    """Append a code span, which nothing inside can end but as many backticks; give the position behind it."""
    ticks = found[0]
    close = re.compile(rf"(?<!`){ticks}(?!`)").search(source, found.end())
    if not close and not open_ended:
        text.append(ticks)
        return found.end()
    end = close.start() if close else len(source)
    marks = ticks if keep_marks else ""
    code = source[found.end() : end]
    # Spaces inside the marks are there for code that begins with a backtick.
    stripped = code[1:-1] if close and code[:1] == code[-1:] == " " and code.strip() else code
    text.append(marks + stripped + (marks if close else ""), CODE)
    return close.end() if close else end


def _mark(
    text: Text, source: str, found: re.Match[str], opened: dict[str, int], *, has_end: bool, open_ended: bool
) -> None:
    mark = found[0]
    before, after = source[: found.start()][-1:], source[found.end() :][:1]
    if mark in opened and before and not before.isspace():
        text.stylize(_STYLES[mark], opened.pop(mark))
        return
    if mark not in opened and not after.isspace() and (after or open_ended) and has_end:
        opened[mark] = len(text)
        return
    text.append(mark)


def _last_closing(source: str) -> dict[str, int]:
    """Give where each mark stands last in a place where it can close: once for a line, which may hold thousands."""
    tokens = _TOKEN.finditer(source)
    return {
        found[0]: found.start() for found in tokens if found["mark"] and not source[found.start() - 1 :][:1].isspace()
    }
