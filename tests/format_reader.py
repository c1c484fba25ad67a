"""HunYuan's format as the engine reads it, through the C entry points of its library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from format_shapes import Call

from hymoe import engine

MODES: Final = ("plain", "tools", "no_calls")
KINDS: Final = ("thought", "answer", "tool", "tag", "held")
# common_reasoning_format of the engine.
REASONING_FORMATS: Final = {"none": 0, "auto": 1, "deepseek-legacy": 2, "deepseek": 3}
_LETTERS: Final = "rcna"


@dataclass(frozen=True)
class Message:
    """What a client gets."""

    reasoning: str
    content: str
    calls: tuple[Call, ...]


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(engine.find().library("llama-common")))
    text: list[Any] = [ctypes.c_char_p, ctypes.c_size_t]
    buffer: list[Any] = [ctypes.c_char_p, ctypes.c_size_t]
    options: list[Any] = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    library.hymoe_hunyuan_parse.argtypes = [*text, ctypes.c_bool, *options, *buffer]
    library.hymoe_hunyuan_parse.restype = ctypes.c_size_t
    library.hymoe_hunyuan_stream.argtypes = [*text, ctypes.POINTER(ctypes.c_size_t), ctypes.c_size_t, *options, *buffer]
    library.hymoe_hunyuan_stream.restype = ctypes.c_size_t
    library.hymoe_hunyuan_kinds.argtypes = [*text, ctypes.c_bool, *options[:2], ctypes.c_char_p]
    library.hymoe_hunyuan_kinds.restype = None
    return library


def parse(
    text: bytes, *, partial: bool = False, mode: str = "plain", begun: str = "", reasoning_format: str = "deepseek"
) -> Message:
    """Read a whole text, or the part of one that has come so far."""
    buffer = ctypes.create_string_buffer(_room(text, begun))
    options = (begun.encode(), MODES.index(mode), REASONING_FORMATS[reasoning_format])
    size = _library().hymoe_hunyuan_parse(text, len(text), partial, *options, buffer, len(buffer))
    return _message(buffer.raw[:size])


def stream(
    text: bytes, ends: Sequence[int], *, mode: str = "plain", begun: str = "", reasoning_format: str = "deepseek"
) -> Message | None:
    """Put the server's deltas together for pieces that end at `ends`; None where one takes something back."""
    buffer = ctypes.create_string_buffer(_room(text, begun))
    options = (begun.encode(), MODES.index(mode), REASONING_FORMATS[reasoning_format])
    array = (ctypes.c_size_t * len(ends))(*ends)
    size = _library().hymoe_hunyuan_stream(text, len(text), array, len(ends), *options, buffer, len(buffer))
    return None if size == ctypes.c_size_t(-1).value else _message(buffer.raw[:size])


def kinds(text: bytes, *, partial: bool = False, mode: str = "plain", begun: str = "") -> list[str]:
    """Name the kind of each byte."""
    buffer = ctypes.create_string_buffer(b"\xff" * len(text), len(text) + 1)
    _library().hymoe_hunyuan_kinds(text, len(text), partial, begun.encode(), MODES.index(mode), buffer)
    return [KINDS[kind] for kind in buffer.raw[: len(text)]]


def _room(text: bytes, begun: str) -> int:
    # thoughts twice at most, escapes of six bytes, and the records' own letters
    return 12 * (len(text) + len(begun)) + 4096


def _message(records: bytes) -> Message:
    fields: dict[str, list[str]] = {letter: [] for letter in _LETTERS}
    while records:
        head, _, rest = records.partition(b":")
        size = int(head[1:])
        fields[chr(head[0])].append(rest[:size].decode("utf-8", "surrogateescape"))
        records = rest[size:]
    calls = tuple(map(Call, fields["n"], fields["a"]))
    return Message(fields["r"][0], fields["c"][0], calls)
