"""The table of outputs in format_shapes.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

# What the vendor's template puts before the output where thinking is off.
FAST: Final = "<think>\n\n</think>\n"


class Call(NamedTuple):
    """A tool call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Shape:
    """One output and what a client must get; the table says what the fields are."""

    name: str
    text: str
    reasoning: str = ""
    content: str = ""
    calls: tuple[Call, ...] = ()
    mode: str = "plain"
    begun: str = ""
    grammar: str = ""

    def __str__(self) -> str:
        return self.name


def _read() -> tuple[Shape, ...]:
    groups: dict[str, list[dict[str, Any]]] = tomllib.loads(
        Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    )
    rows = [row for group in groups.values() for row in group]
    return tuple(Shape(**row | {"calls": tuple(Call(*call) for call in row.get("calls", ()))}) for row in rows)


SHAPES: Final = _read()
