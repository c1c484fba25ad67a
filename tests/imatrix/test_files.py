"""Importance matrices: both forms on disk, and everything that can be wrong with them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from hymoe.errors import ModelFileError, OutputError
from hymoe.imatrix import files
from hymoe.imatrix.cli import main
from hymoe.imatrix.files import Entry, Imatrix

DENSE = Entry(np.array([2, 4, 0, 8], np.float32), np.array([2]))
EXPERTS = Entry(np.array([3, 6, 9, 9, 5, 5], np.float32), np.array([3, 0, 10]))
IMATRIX = Imatrix("x.gguf", {"blk.0.a.weight": DENSE, "blk.0.b_exps.weight": EXPERTS}, ("one.txt", "two.txt"), 5, 512)


def legacy(n_call: int = 4, tail: bytes = b"", name: bytes = b"blk.0.a.weight") -> bytes:
    values = struct.pack("<3f", 4, 8, 2)
    return struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", n_call, 3) + values + tail


@pytest.fixture
def file(tmp_path: Path) -> Path:
    files.write(tmp_path / "x.gguf", IMATRIX)
    return tmp_path / "x.gguf"


def test_gguf_round_trip(file: Path) -> None:
    read = files.read(file)
    assert (read.name, read.datasets, read.n_chunks, read.chunk_size) == ("x.gguf", ("one.txt", "two.txt"), 5, 512)
    assert list(read.entries) == list(IMATRIX.entries)
    for name, entry in IMATRIX.entries.items():
        np.testing.assert_array_equal(read.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(read.entries[name].counts, entry.counts)
    assert len(read.sha256) == 64


def test_the_file_has_the_form_that_llama_imatrix_writes(file: Path) -> None:
    reader = GGUFReader(file)
    assert reader.fields["general.type"].contents() == "imatrix"
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.0.b_exps.weight.in_sum2"] == [2, 3]
    assert shapes["blk.0.b_exps.weight.counts"] == [1, 3]


def test_importance_is_the_mean_and_ones_where_nothing_was_counted(file: Path) -> None:
    read = files.read(file)
    assert read.importance("blk.0.a.weight").tolist() == [1, 2, 0, 4]
    assert read.importance("blk.0.b_exps.weight").tolist() == [1, 2, 1, 1, 0.5, 0.5]
    assert [read.n_empty(name) for name in read.entries] == [0, 1]


def test_legacy(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(legacy(tail=struct.pack("<ii", 9, 4) + b"text"))
    read = files.read(path)
    assert (read.legacy, read.n_chunks, read.datasets) == (True, 9, ("text",))
    assert read.importance("blk.0.a.weight").tolist() == [1, 2, 0.5]
    path.write_bytes(legacy(n_call=0))  # the sums as they are, as llama-quantize has it
    assert files.read(path).importance("blk.0.a.weight").tolist() == [4, 8, 2]
    assert files.read(path).n_empty("blk.0.a.weight") == 0
    with pytest.raises(ValueError, match="holds means"):
        files.write(tmp_path / "new.gguf", files.read(path))


@pytest.mark.parametrize("n_call", [1, 3, 7, 1000])
def test_dat_to_gguf_to_dat_is_the_same_file(n_call: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(n_call)
    name, values = b"blk.0.b_exps.weight", rng.lognormal(0, 5, 3000).astype("<f4")
    raw = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", n_call, values.size) + values.tobytes()
    raw += struct.pack("<ii", n_call, 4) + b"text"
    (tmp_path / "a.dat").write_bytes(raw)
    assert main(["convert", str(tmp_path / "a.dat"), str(tmp_path / "b.gguf")]) == 0
    assert main(["convert", str(tmp_path / "b.gguf"), str(tmp_path / "c.dat")]) == 0
    assert (tmp_path / "c.dat").read_bytes() == raw
    old, new = files.read(tmp_path / "a.dat"), files.read(tmp_path / "b.gguf")
    np.testing.assert_array_equal(new.importance(name.decode()), old.importance(name.decode()))
    assert (new.legacy, new.n_chunks, new.datasets) == (False, n_call, ("text",))


def test_gguf_to_dat_keeps_the_importance_and_says_what_is_lost(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dat = tmp_path / "x.dat"
    assert main(["convert", str(file), str(dat)]) == 0
    assert (
        "cannot hold the counts of single experts, and 1 experts without data are all ones" in capsys.readouterr().err
    )
    wanted, found = files.read(file), files.read(dat)
    for name in wanted.entries:
        np.testing.assert_allclose(found.importance(name), wanted.importance(name), rtol=1e-6)
    assert (found.n_chunks, found.datasets) == (5, ("two.txt",))
    before = dat.read_bytes()
    for cut in range(4, len(before) - 16, 7):
        dat.write_bytes(before[:cut])
        with pytest.raises(ModelFileError, match="no importance matrix") as caught:
            files.read(dat)
        assert "\n" not in str(caught.value)


def test_an_entry_without_data_is_left_out_of_a_dat(tmp_path: Path) -> None:
    nothing = Entry(np.zeros(2, np.float32), np.array([0, 0]))
    files.save(tmp_path / "x.dat", Imatrix("x", {"a": nothing, "b": DENSE}, ("t",), 1, 2))
    assert list(files.read(tmp_path / "x.dat").entries) == ["b"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: got No such file"):
        files.save(tmp_path / "none" / "x.gguf", IMATRIX)
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        files.save(tmp_path / "x.gguf", IMATRIX)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def written(path: Path, *, leave_out: str = "", **tensors: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    writer = GGUFWriter(path, "")
    for key, value in {"imatrix.chunk_count": 1, "imatrix.chunk_size": 512}.items():
        if key != leave_out:
            writer.add_uint32(key, value)
    if leave_out != "imatrix.datasets":
        writer.add_array("imatrix.datasets", ["x"])
    for name, tensor in tensors.items():
        writer.add_tensor(name.replace("__", "."), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def f32(*values: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array([values], np.float32)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "no importance matrix: got a truncated file"),
    "text": (lambda p: p.write_text("hello\n" * 99), "no importance matrix: got another kind of file"),
    "zeros": (lambda p: p.write_bytes(bytes(64)), "no importance matrix: got another kind of file"),
    "legacy cut in a name": (lambda p: p.write_bytes(legacy()[:15]), "another kind of file, or a truncated one"),
    "legacy cut in values": (
        lambda p: p.write_bytes(legacy()[:-3]),
        "got a file that ends in blk.0.a.weight, 9 of 12 bytes",
    ),
    "legacy cut in its tail": (lambda p: p.write_bytes(legacy(tail=b"\1")), "got a truncated file"),
    "legacy with a wild name": (lambda p: p.write_bytes(legacy(name=b"\xff\xfe")), "another kind of file"),
    "GGUF cut in its head": (lambda p: p.write_bytes(b"GGUF\3\0\0\0\1"), "a damaged GGUF"),
    "another GGUF": (lambda p: written(p, weight=f32(1)), "got a GGUF without tensors .in_sum2"),
    "no counts": (lambda p: written(p, a__in_sum2=f32(1)), "a: got only .in_sum2, expected .in_sum2 and .counts"),
    "no data sets": (
        lambda p: written(p, leave_out="imatrix.datasets", a__in_sum2=f32(1), a__counts=f32(1)),
        "no importance matrix: got no imatrix.datasets",
    ),
    "half floats": (
        lambda p: written(p, a__in_sum2=f32(1).astype(np.float16), a__counts=f32(1)),
        "a.in_sum2: got F16, expected F32",
    ),
    "sizes": (
        lambda p: written(p, a__in_sum2=f32(1, 2, 3), a__counts=f32(1, 2)),
        "a: got 3 sums, expected a multiple of its 2 counts",
    ),
    "NaN": (lambda p: written(p, a__in_sum2=f32(1, np.nan), a__counts=f32(1)), "a, value 1: got nan, expected 0"),
    "infinity": (lambda p: written(p, a__in_sum2=f32(np.inf), a__counts=f32(1)), "a, value 0: got inf, expected 0"),
    "negative": (lambda p: written(p, a__in_sum2=f32(0, 1, -2), a__counts=f32(1)), "a, value 2: got -2.0, expected 0"),
    "counts": (lambda p: written(p, a__in_sum2=f32(1), a__counts=f32(-1)), "a.counts: got a value that counts nothing"),
    "legacy NaN": (
        lambda p: p.write_bytes(legacy()[:-4] + struct.pack("<f", np.nan)),
        "blk.0.a.weight, value 2: got nan, expected 0 or more; collect the imatrix again",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_files(name: str, tmp_path: Path) -> None:
    make, says = CASES[name]
    path = tmp_path / "bad"
    make(path)
    with pytest.raises(ModelFileError) as caught:
        files.read(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file or directory; pass an imatrix"):
        files.read(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="Is a directory"):
        files.read(tmp_path)


def test_mutated_files_are_read_or_refused(file: Path, tmp_path: Path) -> None:
    """Nothing but ModelFileError, whatever a byte becomes and wherever the file ends."""
    rng = np.random.default_rng(0)
    path = tmp_path / "mutant"
    for whole in (file.read_bytes(), legacy(tail=struct.pack("<ii", 9, 4) + b"text")):
        refused = 0
        for _ in range(400):
            raw = bytearray(whole)
            for place in rng.integers(0, len(raw), rng.integers(1, 4)):
                raw[place] = rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))])
            cut = int(rng.integers(len(raw))) if rng.random() < 0.3 else len(raw)
            path.write_bytes(raw[:cut])
            try:
                files.read(path)
            except ModelFileError:
                refused += 1
        assert 100 < refused < 400
