"""A cursor over the head of a GGUF file: the one reader of its layout.

Layout (little-endian): "GGUF", u32 version, u64 n_tensors, u64 n_kv; n_kv times (string key, u32 type, value);
n_tensors times (string name, u32 n_dims, u64 dims, u32 type, u64 offset); padding. A string is u64 length + UTF-8
bytes, an array u32 element type + u64 count + elements.

Every step is checked against the file's end before it is taken, and whatever would be built is limited: a file may say
anything, and 45 GB of it are there to be built from. gguf-py's reader takes ten times as long over a vocabulary.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct

from hymoe.errors import ModelFileError

Scalar = int | float | bool | str

VERSIONS = (2, 3)
# Keys are no longer by specification; no text of a real model comes near its limit.
MAX_KEY_BYTES = 2**16 - 1
MAX_TEXT_BYTES = 64 << 20  # all texts that are built, together

STRING, ARRAY = 8, 9
U32, U64 = Struct("<I"), Struct("<Q")
# GGUF value type -> how it is stored. 8 and 9 are strings and arrays.
SCALARS = {
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


@contextmanager
def cursor(path: Path) -> Iterator[Cursor]:
    """Map a file and give a cursor at its start. Raises ModelFileError for what is no file, or empty."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if not size:
                raise ModelFileError(f"{path}: not a GGUF", got="an empty file", expected="'GGUF' at its start")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield Cursor(path, data, size)
    except FileNotFoundError as exc:
        raise ModelFileError(f"{path}: no such file", expected="a GGUF file", fix="hy-convert makes one") from exc
    except OSError as exc:
        raise ModelFileError(f"{path}: cannot be read", got=exc.strerror or exc) from exc


def shown(text: str) -> str:
    """Give a file's own text as an error may show it: short, and without what would move a terminal's cursor."""
    return text[:80] if text[:80].isprintable() else ascii(text[:80])


class Cursor:
    """A place in the mapped file. What does not add up is a ModelFileError that names `where`."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.at = 0
        self.n_text = 0  # bytes of text built so far
        self.where = "the header"

    def begin(self) -> tuple[int, int]:
        """Read magic and version; give the numbers of tensors and of metadata entries."""
        magic = self.data[:4]
        if magic != b"GGUF":
            raise ModelFileError(
                f"{self.path}: not a GGUF",
                got=repr(magic)[1:],
                expected="'GGUF' at its start",
                fix="hy-convert makes one",
            )
        self.at = 4
        version = self.u32()
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            raise ModelFileError(
                f"{self.path}: GGUF version",
                got=f"{version >> 24} in big-endian order" if big else version,
                expected=" or ".join(map(str, VERSIONS)) + " (little-endian)",
                fix="convert the model again",
            )
        return self.u64(), self.u64()

    def keys(self, count: int) -> Iterator[tuple[str, int]]:
        """Give key and type of each entry; the caller takes the value before it asks for the next."""
        for index in range(count):
            self.where = f"metadata entry {index + 1} of {count}"
            key = self.string(MAX_KEY_BYTES)
            self.where = shown(key)
            yield key, self.u32()

    def u32(self) -> int:
        """Read an unsigned number of 4 bytes."""
        return int(self.scalar(U32))

    def u64(self) -> int:
        """Read an unsigned number of 8 bytes."""
        return int(self.scalar(U64))

    def scalar(self, form: Struct) -> Scalar:
        """Read one number."""
        self.require(form.size)
        value: Scalar = form.unpack_from(self.data, self.at)[0]
        self.at += form.size
        return value

    def single(self, kind: int) -> Scalar:
        """Read a value of a type that is no array."""
        if kind == STRING:
            return self.string()
        if kind not in SCALARS:
            raise self.malformed(f"value type {kind}", "a type from 0 to 12")
        return self.scalar(SCALARS[kind])

    def string(self, limit: int = MAX_TEXT_BYTES) -> str:
        """Read a text of at most `limit` bytes."""
        length = self.u64()
        self.require(length)
        limit = min(limit, MAX_TEXT_BYTES - self.n_text)
        if length > limit:
            raise self.malformed(f"a text of {length} bytes", f"at most {limit}")
        self.n_text += length
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self.malformed("a string that is no UTF-8", "UTF-8") from exc

    def array(self) -> tuple[int, int]:
        """Read an array's element type and its count, for which there is room."""
        kind, count = self.u32(), self.u64()
        if kind != STRING and kind not in SCALARS:
            raise self.malformed(f"an array of type {kind}", "an array of numbers or strings")
        # A hostile count would spin for hours if the room for the lengths of strings were not checked first.
        self.require(count * (U64 if kind == STRING else SCALARS[kind]).size)
        return kind, count

    def skip_strings(self, count: int) -> None:
        """Step over strings."""
        at, last, data, unpack = self.at, self.size - U64.size, self.data, U64.unpack_from
        for _ in range(count):
            if at > last:
                raise self.truncated(at + U64.size)
            at += U64.size + unpack(data, at)[0]
        if at > self.size:
            raise self.truncated(at)
        self.at = at

    def raw_strings(self, count: int) -> Iterator[bytes]:
        """Read strings, one at a time."""
        for _ in range(count):
            length = self.u64()
            self.require(length)
            yield self.data[self.at : self.at + length]
            self.at += length

    def require(self, n_bytes: int) -> None:
        """Raise where fewer bytes follow."""
        if n_bytes > self.size - self.at:
            raise self.truncated(self.at + n_bytes)

    def truncated(self, end: int) -> ModelFileError:
        """The error of a file that ends before byte `end`."""
        return ModelFileError(
            f"{self.path}: truncated or damaged at {self.where}",
            got=f"{self.size} bytes",
            expected=f"at least {end}",
            fix="download or convert it again",
        )

    def malformed(self, got: str, expected: str) -> ModelFileError:
        """The error of a file that says what cannot be."""
        return ModelFileError(
            f"{self.path}: damaged at {self.where}", got=got, expected=expected, fix="download or convert it again"
        )
