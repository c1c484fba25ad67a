"""The head of a GGUF file: what to know before a server is started.

Layout (little-endian): "GGUF", u32 version, u64 n_tensors, u64 n_kv, then n_kv times (string key, u32 type, value);
a string is u64 length + UTF-8 bytes, an array is u32 element type + u64 count + elements. Arrays are skipped, not
built: a vocabulary of 128,000 strings costs some 50 ms here and seconds in gguf-py's reader.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from types import MappingProxyType

from hymoe.errors import ModelFileError

Scalar = int | float | bool | str

ARCHITECTURES = ("hunyuan-moe", "hunyuan-large")
VERSIONS = (2, 3)
TOKENS = "tokenizer.ggml.tokens"

# Keys are no longer by specification; no text of a real model comes near its limit. Arrays, which are not copied, may.
MAX_KEY_BYTES = 2**16 - 1
MAX_TEXT_BYTES = 64 << 20  # all keys and strings together

_STRING, _ARRAY = 8, 9
_U32, _U64 = Struct("<I"), Struct("<Q")
# GGUF value type -> how it is stored. 8 and 9 are strings and arrays.
_SCALARS = {
    0: Struct("<B"),
    1: Struct("<b"),
    2: Struct("<H"),
    3: Struct("<h"),
    4: Struct("<I"),
    5: Struct("<i"),
    6: Struct("<f"),
    7: Struct("<?"),
    10: Struct("<Q"),
    11: Struct("<q"),
    12: Struct("<d"),
}


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
    with _mapped(path) as reader:
        return reader.header()


@contextmanager
def _mapped(path: Path) -> Iterator[_Reader]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if not size:
                raise ModelFileError(f"{path}: not a GGUF", got="an empty file", expected="'GGUF' at its start")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield _Reader(path, data, size)
    except FileNotFoundError as exc:
        raise ModelFileError(f"{path}: no such file", expected="a GGUF file", fix="hy-convert makes one") from exc
    except OSError as exc:
        raise ModelFileError(f"{path}: cannot be read", got=exc.strerror or exc) from exc


def token_ids(header: Header, wanted: Collection[str]) -> dict[str, int]:
    """Find tokens by their text; of a text that is there twice the last. Raises ModelFileError as `read` does."""
    array = header.strings.get(TOKENS)
    if array is None:
        return {}
    texts = {text.encode(): text for text in wanted}
    with _mapped(header.path) as reader:
        reader.at = array.offset
        return {texts[token]: i for i, token in enumerate(reader.strings(array.count)) if token in texts}


class _Reader:
    """A cursor over the mapped file; every step is checked against the file's end before it is taken."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.at = 0
        self.n_text = 0  # bytes of text read so far
        self.where = "the header"

    def header(self) -> Header:
        magic = self.data[:4]
        if magic != b"GGUF":
            raise ModelFileError(
                f"{self.path}: not a GGUF",
                got=repr(magic)[1:],
                expected="'GGUF' at its start",
                fix="hy-convert makes one",
            )
        self.at = 4
        version = int(self._scalar(_U32))
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            raise ModelFileError(
                f"{self.path}: GGUF version",
                got=f"{version >> 24} in big-endian order" if big else version,
                expected=" or ".join(map(str, VERSIONS)) + " (little-endian)",
                fix="convert the model again",
            )
        _n_tensors, n_kv = int(self._scalar(_U64)), int(self._scalar(_U64))
        scalars: dict[str, Scalar] = {}
        strings: dict[str, Strings] = {}
        for index in range(n_kv):
            self.where = f"metadata entry {index + 1} of {n_kv}"
            key = self._string(MAX_KEY_BYTES)
            self.where = key[:80]
            value = self._value(int(self._scalar(_U32)))
            if isinstance(value, Strings):
                strings[key] = value
            elif value is not None:
                scalars[key] = value
        return Header(self.path, MappingProxyType(scalars), MappingProxyType(strings))

    def strings(self, count: int) -> Iterator[bytes]:
        """Read `count` strings, which have been stepped over before."""
        for _ in range(count):
            length = int(self._scalar(_U64))
            self._require(length)
            yield self.data[self.at : self.at + length]
            self.at += length

    def _value(self, kind: int) -> Scalar | Strings | None:
        """Read a value; an array is stepped over, and one of strings remembered."""
        if kind == _STRING:
            return self._string(MAX_TEXT_BYTES)
        if kind == _ARRAY:
            return self._skip_array()
        if kind not in _SCALARS:
            raise self._malformed(f"value type {kind}", "a type from 0 to 12")
        return self._scalar(_SCALARS[kind])

    def _scalar(self, form: Struct) -> Scalar:
        self._require(form.size)
        value: Scalar = form.unpack_from(self.data, self.at)[0]
        self.at += form.size
        return value

    def _string(self, limit: int) -> str:
        length = int(self._scalar(_U64))
        self._require(length)
        limit = min(limit, MAX_TEXT_BYTES - self.n_text)
        if length > limit:
            raise self._malformed(f"a text of {length} bytes", f"at most {limit}")
        self.n_text += length
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self._malformed("a string that is no UTF-8", "UTF-8") from exc

    def _skip_array(self) -> Strings | None:
        kind, count = int(self._scalar(_U32)), int(self._scalar(_U64))
        if kind in _SCALARS:
            n_bytes = count * _SCALARS[kind].size
            self._require(n_bytes)
            self.at += n_bytes
            return None
        if kind == _STRING:
            found = Strings(count, self.at)
            self._skip_strings(count)
            return found
        raise self._malformed(f"an array of type {kind}", "an array of numbers or strings")

    def _skip_strings(self, count: int) -> None:
        # A hostile count would spin here for hours if the room for the lengths alone were not checked first.
        self._require(count * _U64.size)
        at, last, data, unpack = self.at, self.size - _U64.size, self.data, _U64.unpack_from
        for _ in range(count):
            if at > last:
                raise self._truncated(at + _U64.size)
            at += _U64.size + unpack(data, at)[0]
        if at > self.size:
            raise self._truncated(at)
        self.at = at

    def _require(self, n_bytes: int) -> None:
        if n_bytes > self.size - self.at:
            raise self._truncated(self.at + n_bytes)

    def _truncated(self, end: int) -> ModelFileError:
        return ModelFileError(
            f"{self.path}: truncated or damaged at {self.where}",
            got=f"{self.size} bytes",
            expected=f"at least {end}",
            fix="download or convert it again",
        )

    def _malformed(self, got: str, expected: str) -> ModelFileError:
        return ModelFileError(
            f"{self.path}: damaged at {self.where}", got=got, expected=expected, fix="download or convert it again"
        )
