"""Text to judge a quantization by: conversations of our own that are no part of the calibration set, or the user's.

Each is rendered in the model's template and evaluated by itself, as a server would meet it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hymoe.chat_templates import fallback
from hymoe.errors import UnsupportedError
from hymoe.imatrix import conversations
from hymoe.imatrix.conversations import Source

if TYPE_CHECKING:
    from hymoe.engine.evaluator import Evaluator

NAME: Final = "conversations.jsonl"
# Fewer say nothing: the mean over tokens of one answer is that answer's.
MIN_TOKENS: Final = 256


def documents(paths: Sequence[Path], template: str | None) -> list[str]:
    """Render the user's files, or our own held-out set, a document a conversation.

    template: the model's own; without one the plain fallback is used. Raises UnsupportedError as `conversations.read`.
    """
    return _rendered([conversations.read(path) for path in paths] or [_ours()], template)


def calibration(paths: Sequence[Path], template: str | None) -> list[str]:
    """Render the user's files, or the calibration set: what may be measured on while something is still chosen.

    Files take turns, so that the first few documents have something of each.
    """
    return _rendered([conversations.read(path) for path in paths] or conversations.calibration_set(), template)


def _rendered(sources: Sequence[Source], template: str | None) -> list[str]:
    used = template or fallback()
    turns = zip_longest(*([(source.name, each) for each in source.conversations] for source in sources))
    return [
        conversations.rendered([Source(name, (each,))], used) for turn in turns for name, each in filter(None, turn)
    ]


def tokens(model: Evaluator, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Give the token ids of each document, none longer than the model's context and `limit` together.

    Raises UnsupportedError for a text that is too short to say anything.
    """
    found: list[list[int]] = []
    left = limit
    for text in texts:
        ids = model.tokenize(text)[: min(left, model.n_ctx)]
        left -= len(ids)
        if ids:
            found.append(ids)
    n_tokens = sum(map(len, found))
    if n_tokens < MIN_TOKENS:
        raise UnsupportedError(
            "text", got=f"{n_tokens} tokens", expected=f"at least {MIN_TOKENS}", fix="give more --text"
        )
    return found


def _ours() -> Source:
    with as_file(files("hymoe.imatrix") / "heldout" / NAME) as path:
        return conversations.read(path)
