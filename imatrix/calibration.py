"""The calibration texts: our own prose, code, mathematics and dialogue in English and Chinese.

The files lie beside this module in `texts/`; `manifest.json` there says what each one is, where it
comes from and under which licence. Importance is collected on them (conversations.py gives them their turns), and
the vocabulary of the embedded miniature is trained on the plain ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Text:
    """One calibration text and its line of the manifest; `bytes` counts its UTF-8 form."""

    file: str
    kind: str
    language: str
    bytes: int
    origin: str
    licence: str
    content: str


def texts() -> Iterator[Text]:
    """Give every plain text in the order of the manifest."""
    return _entries("texts")


def conversations() -> Iterator[Text]:
    """Give every file of conversations, a JSON object with `messages` (and `tools`) a line; not part of `joined`."""
    return _entries("conversations")


def _entries(group: str) -> Iterator[Text]:
    folder = files("hymoe.imatrix") / "texts"
    for entry in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))[group]:
        # Bytes, not text mode: a line ending must not depend on the platform.
        yield Text(content=(folder / entry["file"]).read_bytes().decode("utf-8"), **entry)


@cache
def joined() -> str:
    """Give all plain texts as one string, an empty line between two."""
    return "\n".join(text.content for text in texts())
