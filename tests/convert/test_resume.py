"""What stops a conversion does not cost it: the same command goes on, and the file is the same to the byte."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf import GGUFReader
from interruptible import interrupt, records, run, start

from hymoe.convert import miniature
from hymoe.convert.cli import main
from hymoe.convert.miniature import Spec

SPEC = Spec(n_layer=2, n_embd=64, n_head=2, n_head_kv=1, head_dim=32, n_ff=32, n_expert=4, n_expert_used=2, n_rank=300)
PACE = {"pace": 0.015, "sync": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("resume") / "in", SPEC)


@pytest.fixture(scope="module")
def expected(folder: Path) -> bytes:
    """The file of an uninterrupted run, in pieces of the usual size."""
    out = folder.parent / "expected.gguf"
    assert main([str(folder), str(out), "-q"]) == 0
    return out.read_bytes()


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name != "in")


def stop_in_the_middle(folder: Path, out: Path, *options: str) -> str:
    """Interrupt a conversion after something was recorded and before the end; gives what it said."""
    status, err = interrupt([folder, out, *options], 0.15, signal.SIGINT, n_records=2, **PACE)
    assert status == 130, err
    assert left(out) == [f"{out.name}.journal", f"{out.name}.part"]
    assert records(out) > 1
    return err


@pytest.mark.parametrize("seed", range(2))
def test_kill_at_random_moments(seed: int, folder: Path, expected: bytes, tmp_path: Path) -> None:
    out, chance = tmp_path / "out.gguf", random.Random(seed)
    said = []
    for _ in range(4):
        status, err = interrupt([folder, out], chance.uniform(0, 0.2), signal.SIGKILL, **PACE)
        said.append(err)
        assert status == -signal.SIGKILL, err
        assert not out.exists()
    status, _, err = run([folder, out])
    assert status == 0, err
    assert any("continuing: " in text for text in [*said, err])
    assert out.read_bytes() == expected
    assert left(out) == ["out.gguf"]


@pytest.mark.parametrize("seed", range(3))
def test_power_cut(seed: int, folder: Path, expected: bytes, tmp_path: Path) -> None:
    """Of the weights only what a sync had brought to the disk is left; the journal may have claimed no more."""
    out, part, durable = tmp_path / "out.gguf", tmp_path / "out.gguf.part", tmp_path / "durable"
    chance, lost = random.Random(seed), False
    while not lost:  # a cut just after a sync loses nothing
        delay = chance.uniform(0.1, 0.25)
        status, err = interrupt([folder, out], delay, signal.SIGKILL, durable=str(durable), pace=0.015, sync=0.05)
        assert status == -signal.SIGKILL, err
        lost = durable.exists() and durable.read_bytes() != part.read_bytes()
    durable.replace(part)
    status, _, err = run([folder, out])
    assert status == 0, err
    assert "continuing: " in err
    assert out.read_bytes() == expected


def test_interrupt_says_how_to_go_on(folder: Path, expected: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    err = stop_in_the_middle(folder, out)
    assert err.splitlines()[-1] == "warning: interrupted; run the same command again: it continues"
    assert "Traceback" not in err
    status, _, err = run([folder, out])
    assert status == 0
    assert re.match(r"continuing: [\d.]+ KB of 240\.3 KB are done\n", err), err
    assert out.read_bytes() == expected


def test_interrupt_before_anything_is_done_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    status, err = interrupt([folder, out], 0.1, signal.SIGINT, pace=1.0)
    assert status == 130, err
    assert left(out) == []


def test_only_what_is_missing_is_written(folder: Path, expected: bytes, tmp_path: Path) -> None:
    """Scribble over what the journal calls done: the next run must not touch it."""
    out, part = tmp_path / "out.gguf", tmp_path / "out.gguf.part"
    stop_in_the_middle(folder, out)
    first = json.loads(Path(f"{out}.journal").read_text().splitlines()[1][9:])["pieces"][0]
    assert first[0] == 0
    at = int(GGUFReader(folder.parent / "expected.gguf").data_offset)
    raw, wanted = bytearray(part.read_bytes()), bytearray(expected)
    raw[at : at + 8] = wanted[at : at + 8] = b"SCRIBBLE"
    part.write_bytes(raw)
    assert run([folder, out])[0] == 0
    assert out.read_bytes() == bytes(wanted)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "the last line is torn": lambda raw: raw[:-5],
    "half a line more": lambda raw: raw + b'01234567 {"pieces":[[0,',
    "a line that claims everything": lambda raw: raw + b'00000000 {"pieces":[[0,100000]],"note":null}\n',
    "a claim of another journal": lambda raw: raw + raw.splitlines(keepends=True)[1].replace(b"[[0,", b"[[9,"),
    "zeros after a power cut": lambda raw: raw + bytes(512),
    "a torn line in the middle": lambda raw: b"\n".join(
        [line[:-1] if i == 2 else line for i, line in enumerate(raw.split(b"\n"))]
    ),
    "no head": lambda raw: raw[1:],
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_journal(name: str, folder: Path, expected: bytes, tmp_path: Path) -> None:
    """What it still says is used; what does not add up is written again."""
    out = tmp_path / "out.gguf"
    stop_in_the_middle(folder, out)
    journal = Path(f"{out}.journal")
    journal.write_bytes(DAMAGES[name](journal.read_bytes()))
    status, _, err = run([folder, out])
    assert status == 0, err
    assert ("continuing: " in err) == (name not in ("no head", "empty"))
    assert out.read_bytes() == expected


def test_part_that_is_gone_or_cut(folder: Path, expected: bytes, tmp_path: Path) -> None:
    changes: list[Callable[[Path], object]] = [Path.unlink, lambda part: os.truncate(part, part.stat().st_size - 1)]
    for change in changes:
        out = tmp_path / "out.gguf"
        stop_in_the_middle(folder, out)
        change(Path(f"{out}.part"))
        status, _, err = run([folder, out])
        assert status == 0
        assert "out.gguf.part is not what it was; beginning again" in err
        assert out.read_bytes() == expected
        out.unlink()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run in this process; it must fail with one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def test_changed_option_or_input_is_refused(
    folder: Path, expected: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hymoe.convert import pieces

    monkeypatch.setattr(pieces, "PIECE_BYTES", 4096)
    copy = Path(shutil.copytree(folder, tmp_path / "in"))
    out = tmp_path / "out.gguf"
    stop_in_the_middle(copy, out)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    begun = f"error: {out}.part was begun "
    undo = "; undo the change, or pass --restart to begin again"

    line = refused(capsys, copy, out, "--quant", "F16")
    assert line == f"{begun}with another --quant: got F16, expected BF16{undo}"
    line = refused(capsys, copy, out, "--split-max-size", "100K")
    assert line == f"{begun}with another --split-max-size: got 100000, expected none{undo}"

    shard = copy / "model.safetensors"
    times = (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    os.utime(shard, ns=(times[0], times[1] + 1))
    assert refused(capsys, copy, out) == f"{begun}from another state of model.safetensors{undo}"
    os.utime(shard, ns=times)

    generation = copy / "generation_config.json"
    text = generation.read_text()
    generation.write_text(json.dumps(json.loads(text) | {"temperature": 0.1}))
    assert refused(capsys, copy, out) == f"{begun}with another value of general.sampling.temp{undo}"
    generation.write_text(text)

    monkeypatch.setattr("hymoe.__version__", "99.0")
    assert f"{begun}with another version of hymoe: got 99.0, expected " in refused(capsys, copy, out)
    monkeypatch.undo()

    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before
    status, _, err = run([copy, out])
    assert status == 0
    assert err.startswith("continuing: ")
    assert out.read_bytes() == expected


def test_restart_begins_again(folder: Path, expected: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    stop_in_the_middle(folder, out, "--quant", "F16")
    status, _, err = run([folder, out, "--restart"])
    assert status == 0
    assert "continuing" not in err
    assert out.read_bytes() == expected
    assert left(out) == ["out.gguf"]


def test_overwrite_replaces_at_the_end_only(folder: Path, expected: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    status, err = interrupt([folder, out, "--overwrite"], 0.15, signal.SIGINT, **PACE)
    assert status == 130, err
    assert out.read_bytes() == b"precious"
    status, _, err = run([folder, out])
    assert (status, err) == (1, f"error: {out} exists; choose another name, or pass --overwrite\n")
    assert left(out) == ["out.gguf", "out.gguf.journal", "out.gguf.part"]
    status, _, err = run([folder, out, "--overwrite"])
    assert status == 0
    assert err.startswith("continuing: ")
    assert out.read_bytes() == expected


def test_one_conversion_at_a_time(folder: Path, expected: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    process = start([folder, out], pace=0.03)
    while not Path(f"{out}.journal").exists():
        assert process.poll() is None
    status, _, err = run([folder, out])
    assert (status, err) == (
        1,
        f"error: {out}: another hy-convert is writing it; wait for it, or choose another name\n",
    )
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.read_bytes() == expected


def test_lock_on_a_journal_that_was_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our open and our lock the holder may finish: the lock must be on the file that has the name."""
    from hymoe.convert.journal import open_journal

    path, flock = tmp_path / "out.gguf.journal", fcntl.flock

    def slow(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with open_journal(path, ["out.gguf"], {}, restart=False) as journal:
        assert os.path.samestat(os.fstat(journal.fd), path.stat())


def test_journal_of_many_ranges(tmp_path: Path) -> None:
    from hymoe.convert.journal import open_journal

    path, identity = tmp_path / "out.gguf.journal", {"option": {"--quant": "BF16"}}
    with open_journal(path, ["out.gguf"], identity, restart=False) as journal:
        journal.begin()
        journal.record([5, 1, 2, 9, 3], note=["n"])
        journal.record([])
        journal.record([0])
    with open_journal(path, ["out.gguf"], identity, restart=False) as journal:
        assert journal.records == [({1, 2, 3, 5, 9}, ["n"]), (set(), None), ({0}, None)]
        assert not journal.complete
        journal.record_complete()
    with open_journal(path, ["out.gguf"], identity, restart=False) as journal:
        assert journal.complete
        assert journal.pieces == {0, 1, 2, 3, 5, 9}
    with path.open("ab") as file:
        file.write(b"a torn li")
    with open_journal(path, ["out.gguf"], identity, restart=False) as journal:
        journal.record([7])
    with open_journal(path, ["out.gguf"], identity, restart=False) as journal:
        assert 7 in journal.pieces


# -- full disks and broken ones ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, n_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={-(-n_bytes // 4096) * 4096}", str(folder)], check=True)


def test_full_disk(folder: Path, expected: bytes, small_disk: Path) -> None:
    """It stops with what it has; made larger, with room for the rest and no more, it goes on."""
    out = small_disk / "out.gguf"
    status, _, err = run([folder, out, "-q"])
    assert status == 1
    assert "disk too small: got 163.8 KB free, expected " in err
    assert left(out) == []

    status, _, err = run([folder, out, "-q"], full_disk=True, **PACE)
    message = f"error: {out}: No space left on device; free some space, then run the same command again: it continues\n"
    assert (status, err) == (1, message)
    assert left(out) == ["out.gguf.journal", "out.gguf.part"]
    assert records(out) > 1

    resize(small_disk, len(expected) + 40_000)
    status, _, err = run([folder, out])
    assert status == 0, err
    assert err.startswith("continuing: ")
    assert out.read_bytes() == expected


def test_file_size_limit(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    process = start([folder, out, "-q"])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, hard))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(f"error: {out}: File too large; the file system or a limit (ulimit -f) allows no larger file")
    assert left(out) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == (soft, hard)


def test_broken_input_disk(folder: Path, expected: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    status, _, err = run([folder, out, "-q"], broken_read=40, **PACE)
    assert status == 1
    assert "(model.safetensors): Input/output error; when it can be read, run the same command again: it con" in err
    assert left(out) == ["out.gguf.journal", "out.gguf.part"]
    status, _, err = run([folder, out])
    assert status == 0
    assert err.startswith("continuing: ")
    assert out.read_bytes() == expected


def test_bad_weights_found_late_leave_nothing(tmp_path: Path) -> None:
    """Even where an interrupted run had written a part already."""
    folder, out = miniature.write(tmp_path / "in", SPEC), tmp_path / "out.gguf"
    shard = folder / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    at = 8 + n + header["model.layers.1.mlp.experts.3.down_proj.weight"]["data_offsets"][0]
    raw[at : at + 2] = b"\xc0\x7f"
    shard.write_bytes(raw)
    stop_in_the_middle(folder, out)
    status, _, err = run([folder, out, "-q"])
    assert status == 1
    assert "model.layers.1.mlp.experts.3.down_proj.weight (model.safetensors) at [0, 0]: got the weight nan" in err
    assert left(out) == []


# -- the long way -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("quant", ["BF16", "Q8_0"])
def test_twenty_kills_of_a_larger_conversion(quant: str, tmp_path: Path) -> None:
    spec = Spec(n_layer=2, n_embd=512, n_head=4, n_head_kv=2, head_dim=128, n_ff=512, n_expert=64, n_expert_used=8)
    folder = miniature.write(tmp_path / "in", spec)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 200e6
    assert main([str(folder), str(tmp_path / "expected.gguf"), "--quant", quant, "-q"]) == 0
    out, chance, kills, finished = tmp_path / "out.gguf", random.Random(quant), 0, 0
    while kills < 20:
        pace = {"pace": 0.03, "sync": 0.1, "piece": 1 << 20}
        status, err = interrupt([folder, out, "--quant", quant], chance.uniform(0, 0.6), signal.SIGKILL, **pace)
        if status == 0:  # it was done before it could be killed
            finished += 1
            assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
            out.unlink()
            continue
        assert status == -signal.SIGKILL, err
        kills += 1
    status, _, err = run([folder, out, "--quant", quant], piece=1 << 20)
    assert status == 0, err
    assert "continuing: " in err
    assert finished < 5
    assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
