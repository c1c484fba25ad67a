"""The head of a GGUF file: what to know before a server is started.

Arrays are skipped, not built: a vocabulary of 128,000 strings costs some 50 ms here and seconds in gguf-py's reader.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from hymoe.errors import ModelFileError
from hymoe.gguf_head import ARRAY, SCALARS, STRING, Cursor, Scalar, cursor

ARCHITECTURES = ("hunyuan-moe", "hunyuan-large")
TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Strings:
    """Where an array of strings lies in the file: `count` of them from byte `offset`."""

    count: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What the head of a GGUF says: every key whose value is no array, and where the arrays of strings are."""

    path: Path
    scalars: Mapping[str, Scalar]
    strings: Mapping[str, Strings] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Give `general.architecture`, "" where it is missing."""
        return self._text("general.architecture")

    @property
    def context_length(self) -> int | None:
        """Give the trained context in tokens, None where the file does not say."""
        value = self.scalars.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def chat_template(self) -> str | None:
        """Give the chat template's text, None where there is none."""
        return self._text("tokenizer.chat_template") or None

    @property
    def n_vocab(self) -> int:
        """Give the number of tokens, 0 where there is no vocabulary."""
        tokens = self.strings.get(TOKENS)
        return tokens.count if tokens else 0

    def _text(self, key: str) -> str:
        value = self.scalars.get(key)
        return value if isinstance(value, str) else ""


def peek(path: Path) -> Header:
    """Read the head of a GGUF of this family.

    Raises ModelFileError for a path that is no file, a file that is no GGUF, is cut short or malformed, is a later
    part of a split model, or holds another architecture.
    """
    header = read(path)
    part = header.scalars.get("split.no", 0)
    if part:
        raise ModelFileError(
            f"{path}: a later part of a split model",
            got=f"part {int(part) + 1} of {header.scalars.get('split.count', '?')}",
            expected="part 1",
            fix="give the file that ends in -00001-of-…; the engine finds the others beside it",
        )
    if header.architecture not in ARCHITECTURES:
        raise ModelFileError(
            f"{path}: architecture",
            got=header.architecture or "none",
            expected=" or ".join(ARCHITECTURES),
            fix="hymoe runs HunYuan mixture-of-experts models; make one with hy-convert",
        )
    return header


def read(path: Path) -> Header:
    """Read the head of any GGUF. Raises ModelFileError as `peek` does, but for the architecture and the part."""
    if path.is_dir():
        raise ModelFileError(
            f"{path}: model",
            got="a folder",
            expected="a GGUF file",
            fix="hy-convert makes one from a checkpoint folder",
        )
    with cursor(path) as at:
        return _header(at)


def token_ids(header: Header, wanted: Collection[str]) -> dict[str, int]:
    """Find tokens by their text; of a text that is there twice the last. Raises ModelFileError as `read` does."""
    array = header.strings.get(TOKENS)
    if array is None:
        return {}
    texts = {text.encode(): text for text in wanted}
    with cursor(header.path) as at:
        at.at = array.offset
        return {texts[token]: i for i, token in enumerate(at.raw_strings(array.count)) if token in texts}


def _header(at: Cursor) -> Header:
    _n_tensors, n_kv = at.begin()
    scalars: dict[str, Scalar] = {}
    strings: dict[str, Strings] = {}
    for key, kind in at.keys(n_kv):
        if kind != ARRAY:
            scalars[key] = at.single(kind)
        elif found := _skip_array(at):
            strings[key] = found
    return Header(at.path, MappingProxyType(scalars), MappingProxyType(strings))


def _skip_array(at: Cursor) -> Strings | None:
    """Step over an array, and say where it is if it is one of strings."""
    kind, count = at.array()
    found = Strings(count, at.at) if kind == STRING else None
    if found:
        at.skip_strings(count)
    else:
        at.at += count * SCALARS[kind].size
    return found
