"""Styled text in a terminal's cells: lines broken as English and Chinese want it, and what is unsafe taken away."""

from __future__ import annotations

from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

# A line may not begin with the first, nor end with the second (the common part of the Chinese and Japanese rules).
_NO_BEGIN = frozenset("，。、；：？！）》】」』”’…—·～％,.;:?!)]}%")
_NO_END = frozenset("（《【「『“‘([{")
_TAB = 4

# Control characters of a model's text could move the cursor or retitle the window; those that turn the direction of
# writing around could show code in another order than it is in (U+202A to 202E, U+2066 to 2069).
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))


def harmless(text: str) -> str:
    """Take away every control character but newline and tab, and what overrides the direction of writing."""
    return text.translate(_CONTROLS)


def printable(text: str) -> str:
    """Replace halves of surrogate pairs: Python hands on bytes that are no UTF-8 as such, and nothing encodes them."""
    return text.encode("utf-8", "replace").decode()


def wrap(text: Text, width: int, *, indent: str = "", hanging: str = "") -> list[Text]:
    """Break one line of text into rows of at most `width` cells; the first begins with `indent`, others with `hanging`.

    Rows break after a space, and before and after a wide character where punctuation allows; a longer word is cut.
    More text at the end never changes the rows before the last two.
    """
    return [row for row, _ in rows_and_ends(text, width, indent=indent, hanging=hanging)]


def rows_and_ends(
    text: Text, width: int, *, indent: str = "", hanging: str = "", begin: int = 0
) -> list[tuple[Text, int]]:
    """Break one line as `wrap` does, from character `begin` on, and give for each row also where in the text it ends.

    Positions count in the text with its tabs expanded. Where `begin` is not 0 the first row is one of the others.
    """
    text = text.copy()
    text.expand_tabs(_TAB)
    rest, first = text[begin:], hanging if begin else indent
    breaks = _breaks(rest.plain, *(max(width - cell_len(before), 2) for before in (first, hanging)))
    rows = []
    for i, (part, end) in enumerate(zip(rest.divide(breaks), [*breaks, len(rest)], strict=True)):
        part.rstrip()
        rows.append((Text.assemble(hanging if i else first, part), begin + end))
    return rows


def _breaks(plain: str, room: int, further_room: int) -> list[int]:
    """Give the positions where rows begin, but for the first, which has `room` cells and the others `further_room`."""
    breaks, begin, used, allowed = [], 0, 0, 0
    for at, character in enumerate(plain):
        if at > begin and _may_break(plain[at - 1], character):
            allowed = at
        size = cell_len(character)
        # A space may hang over the edge: it is cut off.
        if used + size > room and character != " ":
            begin = allowed if allowed > begin else at
            breaks.append(begin)
            room = further_room
            used = cell_len(plain[begin:at])
        used += size
    return breaks


def _may_break(before: str, after: str) -> bool:
    if before == " ":
        return after != " "
    wide = cell_len(before) == 2 or cell_len(after) == 2
    return wide and cell_len(after) > 0 and before not in _NO_END and after not in _NO_BEGIN and after != " "


class Ink:
    """How styles become escape sequences: `colours` None writes none at all, `no_colour` keeps bold and dim alone."""

    def __init__(self, colours: ColorSystem | None, *, no_colour: bool = False) -> None:
        self.colours = colours
        self.no_colour = no_colour
        self._console = Console(color_system=None, force_terminal=False, highlight=False, width=80)

    def write(self, text: Text) -> str:
        """Give one row with its escape sequences."""
        segments = list(text.render(self._console))
        return self.segments(segments)

    def segments(self, segments: list[Segment]) -> str:
        """Give rendered segments with their escape sequences."""
        if self.no_colour:
            segments = list(Segment.remove_color(segments))
        return "".join(
            segment.style.render(segment.text, color_system=self.colours) if segment.style else segment.text
            for segment in segments
            if not segment.control
        )
