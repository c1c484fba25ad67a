"""Markdown that is still being written, as rows for a terminal: what is finished once, the rest as it is now.

A line is finished when its newline has come, a table when something else follows it. So what was printed is never
printed again, and what may still change (one line, or one table) is small; where it would not fit on the screen, its
first rows are finished too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from hymoe.runtime.inline import inline
from hymoe.runtime.wrap import Ink, harmless, rows_and_ends

_FENCE = re.compile(r"( {0,12})(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*")
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*")
_RULE = re.compile(r" {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})")
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])([ \t]+)(.*)")
_QUOTE = re.compile(r" {0,3}((?:> ?)+)(.*)")
_TABLE_ROW = re.compile(r" {0,3}\|.*")
_TABLE_RULE = re.compile(r" {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")
_CELL_BORDER = re.compile(r"(?<!\\)\|")
# The lexer sees this many lines back: a string or comment longer than that may lose its colour.
_LEXED_LINES = 100


@dataclass
class _Code:
    """An open code block: its fence, language, indentation, and the lines so far."""

    fence: str
    language: str
    indent: str
    lines: list[str] = field(default_factory=list)


class MarkdownStream:
    """Feed text, get finished rows (each ends with a newline); `live` gives the unfinished ones."""

    def __init__(self, ink: Ink, width: int) -> None:
        self.width = width
        self._ink = ink
        self._line = ""  # without its newline as yet
        self._done = 0  # characters of it, as it is laid out, whose rows are finished
        self._table: list[str] = []
        self._code: _Code | None = None
        self._blank = False  # a blank line is owed before the next text
        self._begun = False

    def resize(self, width: int) -> None:
        """Lay out for another width from here on; what is finished stays."""
        self.width = width

    def feed(self, text: str) -> str:
        """Take more text; give the rows that it finishes."""
        *lines, rest = (self._line + harmless(text)).split("\n")
        out = []
        for line in lines:
            out.append(self._finish_line(line))
            self._done = 0
        self._line = rest
        return "".join(out)

    def finish(self) -> str:
        """Finish what is left."""
        line, self._line = self._line, ""
        out = self._finish_line(line) if line else ""
        self._done = 0
        return out + self._end_table()

    def live(self, max_rows: int) -> tuple[str, list[str]]:
        """Give (rows that are finished since more than `max_rows` would be live, the live rows)."""
        if self._in_table(self._line) or (self._table and not self._line):
            return self._live_table(max_rows)
        done = self._end_table()
        if not self._line:
            return done, []
        laid_out = self._rows(self._line, open_ended=True)
        rows = [row for row, _ in laid_out]
        before = "\n" if self._owes_blank() and not self._done else ""
        if len(rows) > max_rows:
            n = len(rows) - max_rows // 2
            done += before + "".join(f"{row}\n" for row in rows[:n])
            self._done = laid_out[n - 1][1]
            self._blank, self._begun = False, True
            return done, rows[n:]
        return done, ["", *rows] if before else rows

    def _live_table(self, max_rows: int) -> tuple[str, list[str]]:
        lines = [*self._table, *filter(None, [self._line])]
        rows = self._table_rows(lines)
        done = ""
        if len(rows) > max_rows and len(self._table) > 2:
            # The rest goes on as a table of its own, under the same head.
            head = self._table[:2]
            done = self._end_table()
            self._table = head
            rows = self._table_rows([*head, *filter(None, [self._line])])
        return done, ["", *rows] if self._owes_blank() else rows

    def _finish_line(self, line: str) -> str:
        """Give the rows of a complete line, as far as they are not finished already."""
        if self._code is None and self._in_table(line):
            self._table.append(line)
            return ""
        out = self._end_table()
        if self._code is None and not line.strip():
            self._blank = True
            return out
        # What is on the screen was laid out as an open-ended line: the rest must follow it.
        rows = self._rows(line, open_ended=self._done > 0)
        if self._owes_blank() and not self._done:
            out += "\n"
        self._advance(line)
        self._blank, self._begun = False, True
        return out + "".join(f"{row}\n" for row, _ in rows)

    def _owes_blank(self) -> bool:
        return self._blank and self._begun

    def _in_table(self, line: str) -> bool:
        return self._code is None and bool(_TABLE_ROW.fullmatch(line))

    def _advance(self, line: str) -> None:
        """Enter or leave a code block, or remember its line."""
        fence = _FENCE.fullmatch(line)
        code = self._code
        if code is None:
            if fence:
                self._code = _Code(fence[2], fence[3], fence[1])
        elif fence and not fence[3] and fence[2].startswith(code.fence):
            self._code = None
        else:
            code.lines.append(line)

    def _rows(self, line: str, *, open_ended: bool) -> list[tuple[str, int]]:
        """Lay out what of one line is not finished: rows, and where each ends."""
        code = self._code
        if code is not None:
            if (found := _FENCE.fullmatch(line)) and not found[3] and found[2].startswith(code.fence):
                return self._wrapped(Text(line.strip(), "dim"), code.indent, code.indent)
            return self._code_rows(code, line)
        if found := _FENCE.fullmatch(line):
            return self._wrapped(Text(line.strip(), "dim"), found[1], found[1])
        if found := _HEADING.fullmatch(line):
            heading = self._inline(found[2], open_ended=open_ended)
            heading.stylize("bold" if len(found[1]) > 1 else "bold underline")
            return self._wrapped(heading, "", "")
        if _RULE.fullmatch(line) and not open_ended:
            return self._wrapped(Text("─" * min(self.width - 1, 40), "dim"), "", "")
        return self._text_rows(line, open_ended=open_ended)

    def _text_rows(self, line: str, *, open_ended: bool) -> list[tuple[str, int]]:
        if found := _ITEM.fullmatch(line):
            bullet = "•" if found[2] in "-*+" else found[2]
            indent = f"{found[1].expandtabs(4)}{bullet} "
            return self._wrapped(self._inline(found[4], open_ended=open_ended), indent, " " * len(indent))
        if found := _QUOTE.fullmatch(line):
            bar = "│ " * found[1].count(">")
            quote = self._inline(found[2], open_ended=open_ended)
            quote.stylize("italic")
            return self._wrapped(quote, bar, bar)
        text = line.lstrip(" \t")
        indent = line[: len(line) - len(text)].expandtabs(4)
        return self._wrapped(self._inline(text.rstrip(), open_ended=open_ended), indent, indent)

    def _code_rows(self, code: _Code, line: str) -> list[tuple[str, int]]:
        """Lay out a line of code, coloured in the light of the lines before it."""
        before = [*code.lines[-_LEXED_LINES:], line]
        text = Text(line)
        if code.language and not self._ink.no_colour and self._ink.colours is not None:
            lexed = Syntax("", code.language, theme="ansi_dark", background_color="default").highlight(
                "\n".join(before)
            )
            lines = lexed.split("\n", allow_blank=True)
            # A lexer may add or take blank lines; then the colour is not worth a wrong line.
            text = next((one for one in reversed(lines) if one.plain == line), text)
        if line.startswith(code.indent):
            text = text[len(code.indent) :] if code.indent else text
            return self._wrapped(text, code.indent, code.indent)
        return self._wrapped(text, "", "")

    def _inline(self, source: str, *, open_ended: bool) -> Text:
        plain = self._ink.no_colour or self._ink.colours is None
        return inline(source, open_ended=open_ended, keep_code_marks=plain)

    def _wrapped(self, text: Text, indent: str, hanging: str) -> list[tuple[str, int]]:
        # The last column stays free: some terminals wrap as soon as it is written.
        rows = rows_and_ends(text, self.width - 1, indent=indent, hanging=hanging, begin=self._done)
        return [(self._ink.write(row), end) for row, end in rows]

    def _end_table(self) -> str:
        """Give the rows of the table that has ended, with the blank line before it."""
        lines, self._table = self._table, []
        if not lines:
            return ""
        rows = self._table_rows(lines)
        before = "\n" if self._owes_blank() else ""
        self._blank, self._begun = False, True
        return before + "".join(f"{row}\n" for row in rows)

    def _table_rows(self, lines: list[str]) -> list[str]:
        if len(lines) < 2 or not _TABLE_RULE.fullmatch(lines[1]):
            return [row for line in lines for row, _ in self._text_rows(line, open_ended=False)]
        table = Table(show_edge=False, pad_edge=False, box=SIMPLE_HEAD)
        head, rule, *rows = (_cells(line) for line in lines if line.strip())
        for i, cell in enumerate(head):
            mark = rule[i] if i < len(rule) else ""
            left, right = mark.startswith(":"), mark.endswith(":")
            justify = ("center" if left else "right") if right else "left"
            table.add_column(self._inline(cell, open_ended=True), justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(self._inline(cell, open_ended=True) for cell in [*row, *[""] * len(head)][: len(head)]))
        console = Console(width=max(self.width - 1, 8), color_system=None, force_terminal=False, highlight=False)
        return [self._ink.segments(row).rstrip() for row in console.render_lines(table, pad=False)]


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|")
    cells = [cell.strip().replace("\\|", "|") for cell in _CELL_BORDER.split(inner)]
    return cells[:-1] if len(cells) > 1 and not cells[-1] else cells
