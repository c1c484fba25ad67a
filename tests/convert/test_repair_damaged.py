"""hy-convert --repair on heads that say what cannot be: one line each, whatever is changed in one of full size."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from scripted_model import N_RANKS, VENDOR_SAMPLING
from tiny_model import SPECIAL

from hymoe.convert import repair
from hymoe.convert.cli import main
from hymoe.convert.head import MAX_ELEMENTS, MAX_ENTRIES, MAX_TENSORS, read_head
from hymoe.errors import HyError, ModelFileError
from hymoe.gguf_head import SCALARS

ARCH = "hunyuan-moe"
WIDTHS = {
    "blk.0.ffn_gate_exps.weight": (2, 4, 4),
    "blk.0.ffn_gate_shexp.weight": (4, 4),
    "blk.0.attn_q_norm.weight": (4,),
    "token_embd.weight": (N_RANKS + 210, 4),
}
NUMBERS = {
    **{f"{ARCH}.{name}": 4 for name in ("block_count", "embedding_length", "context_length", "expert_count")},
    **{f"{ARCH}.{name}": 2 for name in ("attention.head_count", "attention.head_count_kv", "expert_used_count")},
}
N_MUTATIONS = 300
NUMBERS_OF_EVERY_SIZE = (0, 1, -1, 20.0, 0.5, 2**31, 2**32 - 1, 2**63, 1e300, float("inf"), float("nan"), True)


class File(NamedTuple):
    """A head in parts: metadata entries by key, and tensors with their dimensions, innermost first."""

    entries: dict[str, bytes]
    tensors: list[tuple[str, list[int], int]]

    def write(self, path: Path, room: int = 1 << 24) -> Path:
        """Write it before `room` bytes that take none on the disk."""
        with path.open("wb") as file:
            file.write(b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.entries)))
            file.write(b"".join(self.entries.values()))
            for name, dims, kind in self.tensors:
                form = f"<Q{len(name)}sI{len(dims)}QIQ"
                file.write(struct.pack(form, len(name), name.encode(), len(dims), *dims, kind, 0))
            file.truncate(file.tell() + room)
        return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> File:
    """A head with as many tokens as Hunyuan-A13B has, which are no ranks of bytes: no merges are looked for."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    writer = GGUFWriter(path, ARCH)
    for key, number in NUMBERS.items():
        writer.add_uint32(key, number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    for name, value in VENDOR_SAMPLING:
        kind = GGUFValueType.INT32 if name in ("top_k", "penalty_last_n") else GGUFValueType.FLOAT32
        writer.add_key_value(f"general.sampling.{name}", value, kind)
    specials = [*SPECIAL[:5], *(f"<|extra_{i}|>" for i in range(205))]
    writer.add_token_list([*(f"{i}" for i in range(N_RANKS)), *specials])
    writer.add_token_types([1])
    writer.add_chat_template("x")
    for name, shape in WIDTHS.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    head = read_head(path)
    tensors = [(name, list(reversed(shape)), 0) for name, shape in head.shapes.items()]
    return File({key: entry.raw for key, entry in head.entries.items()}, tensors)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key.encode())) + key.encode() + struct.pack("<I", kind) + value


def number(key: str, kind: str, value: float) -> bytes:
    return entry(key, GGUFValueType[kind], SCALARS[GGUFValueType[kind]].pack(value))


def changed(whole: File, *entries: tuple[str, bytes]) -> File:
    return whole._replace(entries=whole.entries | dict(entries))


def said(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of the file: one line, and exit status 1."""
    assert main(["--repair", str(path), "--dry-run", "-q"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# sampling key -> (its type and value in the file, what the repaired file says)
COERCED: dict[str, Sequence[tuple[str, float, float]]] = {
    "top_k": [
        *(("FLOAT32", 20.0, 20), ("FLOAT32", 35.0, 35), ("UINT64", 40, 40), ("FLOAT32", 20.5, 20)),
        *(("UINT32", 2**32 - 1, 20), ("FLOAT64", 1e300, 20), ("FLOAT32", float("nan"), 20), ("BOOL", True, 20)),
    ],
    "temp": [("FLOAT64", 1e300, 0.7), ("FLOAT32", float("inf"), 0.7), ("UINT32", 1, 1.0), ("FLOAT64", 0.5, 0.5)],
    "penalty_last_n": [("INT64", -1, -1), ("UINT32", 64, 64), ("INT64", -(2**40), -1)],
}


@pytest.mark.parametrize(("name", "cases"), COERCED.items(), ids=COERCED)
def test_sampling_is_kept_where_it_can_be_written(
    whole: File, tmp_path: Path, name: str, cases: Sequence[tuple[str, float, float]]
) -> None:
    key = f"general.sampling.{name}"
    for kind, value, wanted in cases:
        foreign = changed(whole, (key, number(key, kind, value))).write(tmp_path / "foreign.gguf")
        out = tmp_path / "out.gguf"
        assert main(["--repair", str(foreign), str(out), "-q", "--overwrite"]) == 0
        found = read_head(out).entries[key]
        assert found.kind == (GGUFValueType.FLOAT32 if name == "temp" else GGUFValueType.INT32)
        assert found.value == pytest.approx(wanted, rel=1e-6), (kind, value)


def resized(whole: File, name: str, dims: list[int]) -> File:
    return whole._replace(tensors=[(other, dims if other == name else old, 0) for other, old, _ in whole.tensors])


def test_shapes_that_no_key_can_say(whole: File, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    flat = resized(whole, "blk.0.ffn_gate_exps.weight", [4]).write(path)
    assert "blk.0.ffn_gate_exps.weight: shape: got [4], expected dimension 1 of 32 bits" in said(flat, capsys)
    # No rows of an outer dimension: so wide a tensor has no bytes, and fits the file.
    wide = resized(whole, "blk.0.ffn_gate_shexp.weight", [0, 2**33]).write(path)
    assert f"blk.0.ffn_gate_shexp.weight: shape: got [{2**33}, 0], expected" in said(wide, capsys)
    lacking = whole._replace(tensors=whole.tensors[1:]).write(path)
    assert f"not a complete {ARCH} model: got no blk.0.ffn_gate_exps.weight" in said(lacking, capsys)


def test_floats_that_no_key_can_say(whole: File, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = f"{ARCH}.rope.freq_base"
    for kind, value in (("FLOAT64", 1e300), ("FLOAT32", float("nan")), ("FLOAT32", float("-inf")), ("UINT32", 5)):
        path = changed(whole, (key, number(key, kind, value))).write(tmp_path / "m.gguf")
        assert f"{key}: got {value}, expected a finite number of 32 bits" in said(path, capsys)


def array(kind: int, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


LARGE = 45_000_000_000
# what a crafted file says before LARGE bytes -> how it is refused
CRAFTED: dict[str, tuple[bytes, str]] = {
    "bytes": (entry("k", 9, array(0, LARGE - 100)), f"at k: got {LARGE - 100} elements of arrays"),
    "numbers": (entry("k", 9, array(12, LARGE // 10)), f"at k: got {LARGE // 10} elements of arrays"),
    "empty texts": (entry("k", 9, array(8, LARGE // 10)), f"expected at most {MAX_ELEMENTS}"),
    "text": (entry("k", 8, struct.pack("<Q", LARGE - 100)), f"at k: got a text of {LARGE - 100} bytes"),
    "alignment": (number("general.alignment", "UINT64", 2**35), f"at general.alignment: got {2**35}"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_file_does_not_fill_the_memory(tmp_path: Path, case: str) -> None:
    raw, message = CRAFTED[case]
    path = File({"k": raw}, []).write(tmp_path / "m.gguf", room=LARGE)
    check_refused(path, message)


@pytest.mark.parametrize(
    ("counts", "message"),
    [((0, 2**30), f"metadata entries, expected at most {MAX_ENTRIES}"), ((2**30, 0), f"at most {MAX_TENSORS}")],
)
def test_counts_that_no_model_has(tmp_path: Path, counts: tuple[int, int], message: str) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, *counts))
        file.truncate(LARGE)
    check_refused(path, message)


def check_refused(path: Path, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as caught:
            read_head(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)


def spoiled(rng: Random, whole: File) -> File:
    """One or a few entries or dimensions otherwise; the types of values, and what they are."""
    entries, tensors = dict(whole.entries), [(name, list(dims), kind) for name, dims, kind in whole.tensors]
    for _ in range(rng.choice((1, 1, 2, 5))):
        if rng.random() < 0.25:
            dims = rng.choice(tensors)[1]
            dims[rng.randrange(len(dims))] = rng.choice((0, 1, 2, 3, 2**32 - 1, 2**32, 2**63))
        else:
            key = rng.choice(list(entries))
            entries[key] = _spoiled(rng, key, entries[key])
    return File(entries, tensors)


def _spoiled(rng: Random, key: str, raw: bytes) -> bytes:
    begin = 8 + len(key.encode())
    if rng.random() < 0.3:  # bytes, the first ones of the value more often
        changed = bytearray(raw)
        at = begin + min(rng.randrange(64), rng.randrange(len(raw) - begin))
        changed[min(at, len(raw) - 1)] = rng.choice((0, 1, 127, 255))
        return bytes(changed)
    kind = rng.choice([*SCALARS, 8, 9])
    if kind == 8:
        return entry(key, 8, struct.pack("<Q", 3) + rng.choice((b"abc", b"\xff\0a", b"\n\r\x1b")))
    if kind == 9:
        return entry(key, 9, rng.choice((array(0, 3) + b"\1\2\3", array(8, 0), array(8, 1) + bytes(8), array(9, 1))))
    while True:
        value: Any = rng.choice(NUMBERS_OF_EVERY_SIZE)
        try:
            return entry(key, kind, SCALARS[kind].pack(value))
        except (struct.error, OverflowError):
            continue


def test_whatever_is_changed_it_is_one_line(whole: File, tmp_path: Path) -> None:
    """Read as something, or refused by name; anything but a HyError is a traceback, and fails here."""
    rng = Random(8)
    refused: list[str] = []
    path = tmp_path / "m.gguf"
    for _ in range(N_MUTATIONS):
        spoiled(rng, whole).write(path)
        try:
            repair.examine(path)
        except HyError as exc:
            refused.append(str(exc))
    assert N_MUTATIONS // 5 < len(refused) < N_MUTATIONS * 4 // 5
    for line in refused:
        assert line.isprintable()
        assert not any(word in line for word in ("index", "tuple", "unpack", "format", "None"))
