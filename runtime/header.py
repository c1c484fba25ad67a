"""The head of a GGUF file: what to know before a server is started.

Arrays are skipped, not built: a vocabulary of 128,000 strings costs some 50 ms here and seconds in gguf-py's reader.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from hymoe import sizes
from hymoe.errors import ModelFileError
from hymoe.gguf_head import ARRAY, SCALARS, STRING, Cursor, Scalar, TensorInfo, cursor

ARCHITECTURES = ("hunyuan-moe", "hunyuan-large")
TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Span:
    """Where a list lies in the file: `count` entries from byte `offset`."""

    count: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What the head of a GGUF says: every key whose value is no array, and where the arrays of strings are.

    table: where the tensor table lies, one line of it for each tensor.
    """

    path: Path
    scalars: Mapping[str, Scalar]
    strings: Mapping[str, Span] = field(default_factory=dict)
    table: Span = Span(0, 0)

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


def parts(model: Path) -> list[Path]:
    """Give the files of a model: those beside a first part `NAME-00001-of-00004.gguf` too, as far as they are there."""
    found = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", model.name)
    if found is None:
        return [model]
    names = [f"{found[1]}-{number:05}-of-{found[2]}.gguf" for number in range(2, int(found[2]) + 1)]
    return [model, *(part for name in names if (part := model.with_name(name)).is_file())]


def tensors(first: Header) -> list[TensorInfo]:
    """Read the tensor tables of all parts of a model. Raises ModelFileError as `read` does, and for a missing part."""
    return [info for _, table, _ in _tables(first) for info in table]


def require_data(first: Header) -> None:
    """See that all parts are as long as their tables say, which a download that was cut short is not.

    Raises ModelFileError, and as `tensors` does; ValueError for a type that ggml lacks, or rows that are no whole
    number of blocks.
    """
    from gguf import GGMLQuantizationType

    for header, table, end in _tables(first):
        alignment = header.scalars.get("general.alignment", sizes.ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelFileError(f"{header.path}: general.alignment", got=alignment, expected="a number of bytes")
        ends = (info.offset + sizes.tensor_bytes(info.shape, GGMLQuantizationType(info.kind)) for info in table)
        expected = sizes.padded(end, alignment) + max(ends, default=0)
        got = header.path.stat().st_size
        if got < expected:
            fix = "download or convert it again"
            raise ModelFileError(f"{header.path}: cut short", got=f"{got} bytes", expected=f"{expected}", fix=fix)


def _tables(first: Header) -> Iterator[tuple[Header, list[TensorInfo], int]]:
    """Give each part's head, its tensor table, and where that ends."""
    files = parts(first.path)
    wanted = first.scalars.get("split.count", 1)
    if wanted and len(files) != wanted:
        raise ModelFileError(
            f"{first.path}: parts", got=len(files), expected=wanted, fix="download the others beside it"
        )
    for file in files:
        header = first if file == first.path else read(file)
        with cursor(file) as at:
            at.at = header.table.offset
            yield header, list(at.tensors(header.table.count)), at.at


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
    n_tensors, n_kv = at.begin()
    scalars: dict[str, Scalar] = {}
    strings: dict[str, Span] = {}
    for key, kind in at.keys(n_kv):
        if kind != ARRAY:
            scalars[key] = at.single(kind)
        elif found := _skip_array(at):
            strings[key] = found
    return Header(at.path, MappingProxyType(scalars), MappingProxyType(strings), Span(n_tensors, at.at))


def _skip_array(at: Cursor) -> Span | None:
    """Step over an array, and say where it is if it is one of strings."""
    kind, count = at.array()
    found = Span(count, at.at) if kind == STRING else None
    if found:
        at.skip_strings(count)
    else:
        at.at += count * SCALARS[kind].size
    return found
