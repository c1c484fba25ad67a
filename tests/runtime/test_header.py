"""The head of a GGUF: read by us, compared with gguf-py; and everything that can be wrong with it."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from tiny_model import TRAINED, write_model

from hymoe.chat_templates import fallback
from hymoe.errors import ModelFileError
from hymoe.gguf_head import MAX_TEXT_BYTES
from hymoe.runtime.header import peek, read

NUMBERS = {
    "uint8": 200,
    "int8": -3,
    "uint16": 60000,
    "int16": -4,
    "uint32": 7,
    "int32": -9,
    "uint64": 2**60,
    "int64": -5,
}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A file with every type of value, arrays in front of what is wanted."""
    writer = GGUFWriter(tmp_path / "odd.gguf", "hunyuan-moe")
    writer.add_array("a.strings", ["", "ä", "x" * 300])
    writer.add_array("a.numbers", [1.5, 2.5])
    writer.add_array("a.bools", [True, False, True])
    for name, value in NUMBERS.items():
        writer.add_key_value(f"n.{name}", value, GGUFValueType[name.upper()])
    writer.add_float32("n.float32", 0.5)
    writer.add_float64("n.float64", 0.1)
    writer.add_bool("n.bool", True)
    writer.add_string("s.text", "你好\n")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "odd.gguf"


def test_every_scalar_is_what_gguf_py_reads(odd: Path) -> None:
    reader = GGUFReader(odd)
    expected = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and GGUFValueType.ARRAY not in field.types
    }
    assert len(expected) == len(NUMBERS) + 5
    assert dict(read(odd).scalars) == expected


def test_what_a_server_needs(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", template=fallback())
    header = peek(path)
    assert (header.architecture, header.context_length) == ("hunyuan-moe", TRAINED)
    assert header.chat_template == fallback()


def test_absent_keys(odd: Path) -> None:
    header = peek(odd)
    assert (header.context_length, header.chat_template) == (None, None)


def gguf(version: int, n_kv: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, n_kv) + rest


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@contextmanager
def memory_below(n_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()


def test_a_large_vocabulary_is_not_built(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", template=fallback(), words=128000)
    with memory_below(1 << 20):  # as a list it would be 8 MiB
        peek(path)


GIGABYTES = 3 * 10**9
# name -> (what the file says before a text of GIGABYTES that takes no room on disk, the message after the path)
LARGE_TEXTS = {
    "key": (
        struct.pack("<Q", GIGABYTES),
        ": damaged at metadata entry 1 of 1: got a text of 3000000000 bytes, expected at most 65535; ",
    ),
    "string": (
        entry(b"k", 8, struct.pack("<Q", GIGABYTES)),
        ": damaged at k: got a text of 3000000000 bytes, expected at most 67108863; ",
    ),
}


@pytest.mark.parametrize("name", LARGE_TEXTS)
def test_a_text_of_gigabytes_is_not_copied(tmp_path: Path, name: str) -> None:
    start, message = LARGE_TEXTS[name]
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(gguf(3, 1, start))
        file.truncate(file.tell() + GIGABYTES)
    with memory_below(1 << 20), pytest.raises(ModelFileError) as caught:
        read(path)
    assert str(caught.value) == f"{path}{message}download or convert it again"


def test_many_texts_are_limited_together(tmp_path: Path) -> None:
    """Each is short enough, and the third is too much."""
    path = tmp_path / "model.gguf"
    n = MAX_TEXT_BYTES // 2 - 1
    with path.open("wb") as file:
        file.write(gguf(3, 3, b""))
        for key in (b"a", b"b", b"c"):
            file.write(entry(key, 8, struct.pack("<Q", n)))
            file.seek(n, os.SEEK_CUR)
        file.truncate()
    with pytest.raises(
        ModelFileError, match=r": damaged at metadata entry 3 of 3: got a text of 1 bytes, expected at "
    ):
        read(path)


def test_every_truncation_is_one_clear_line(odd: Path, tmp_path: Path) -> None:
    whole = odd.read_bytes()
    end = len(whole.rstrip(b"\0"))
    short = tmp_path / "short.gguf"
    for size in range(end):
        short.write_bytes(whole[:size])
        with pytest.raises(ModelFileError) as caught:
            read(short)
        assert str(caught.value).startswith(f"{short}: " + ("truncated" if size >= 4 else "not a GGUF"))


# name -> (bytes of the file, the message after the path)
DAMAGED = {
    "empty": (b"", ": not a GGUF: got an empty file, expected 'GGUF' at its start"),
    "zip": (
        b"PK\x03\x04" + bytes(60),
        ": not a GGUF: got 'PK\\x03\\x04', expected 'GGUF' at its start; hy-convert makes one",
    ),
    "version 1": (gguf(1, 0, b""), ": GGUF version: got 1, expected 2 or 3 (little-endian); convert the model again"),
    "big-endian": (
        gguf(3 << 24, 0, b""),
        ": GGUF version: got 3 in big-endian order, expected 2 or 3 (little-endian); convert the model again",
    ),
    "more entries than bytes": (
        gguf(3, 2**62, b""),
        f": truncated or damaged at metadata entry 1 of {2**62}: got 24 bytes, expected at least 32; "
        "download or convert it again",
    ),
    "endless key": (
        gguf(3, 1, struct.pack("<Q", 2**63)),
        f": truncated or damaged at metadata entry 1 of 1: got 32 bytes, expected at least {2**63 + 32}; "
        "download or convert it again",
    ),
    "endless array": (
        gguf(3, 1, entry(b"k", 9, struct.pack("<IQ", 8, 2**60))),
        f": truncated or damaged at k: got 49 bytes, expected at least {2**63 + 49}; download or convert it again",
    ),
    "string past the end": (
        gguf(3, 1, entry(b"k", 9, struct.pack("<IQQ", 8, 1, 99))),
        ": truncated or damaged at k: got 57 bytes, expected at least 156; download or convert it again",
    ),
    "unknown type": (
        gguf(3, 1, entry(b"k", 13, b"")),
        ": damaged at k: got value type 13, expected a type from 0 to 12; download or convert it again",
    ),
    "nested array": (
        gguf(3, 1, entry(b"k", 9, struct.pack("<IQ", 9, 1))),
        ": damaged at k: got an array of type 9, expected an array of numbers or strings; download or convert it again",
    ),
    "no UTF-8": (
        gguf(3, 1, entry(b"k", 8, struct.pack("<Q", 1) + b"\xff")),
        ": damaged at k: got a string that is no UTF-8, expected UTF-8; download or convert it again",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read(path)
    assert str(caught.value) == f"{path}{message}"


def test_another_architecture(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", architecture="llama")
    with pytest.raises(ModelFileError) as caught:
        peek(path)
    assert str(caught.value) == (
        f"{path}: architecture: got llama, expected hunyuan-moe or hunyuan-large; "
        "hymoe runs HunYuan mixture-of-experts models; make one with hy-convert"
    )


def test_a_later_part_of_a_split_model(tmp_path: Path) -> None:
    path = tmp_path / "model-00002-of-00003.gguf"
    number = struct.pack("<H", 1), struct.pack("<H", 3)
    path.write_bytes(gguf(3, 2, entry(b"split.no", 2, number[0]) + entry(b"split.count", 2, number[1])))
    with pytest.raises(ModelFileError, match="a later part of a split model: got part 2 of 3, expected part 1;"):
        peek(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        peek(tmp_path / "none.gguf")
    assert str(caught.value) == f"{tmp_path}/none.gguf: no such file: expected a GGUF file; hy-convert makes one"
    with pytest.raises(ModelFileError, match="model: got a folder, expected a GGUF file;"):
        peek(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(odd: Path) -> None:
    odd.chmod(0)
    with pytest.raises(ModelFileError, match="cannot be read: got Permission denied"):
        peek(odd)
