"""hy-convert --repair: a GGUF of another tool gets the metadata that ours writes; its weights stay."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from chat_templates.conversations import vendor_template
from convert.foreign import write_foreign
from gguf import GGUFReader

from hymoe.chat_templates import fallback, repair
from hymoe.convert import repair as repairs
from hymoe.convert.cli import main
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.head import read_head
from hymoe.convert.miniature import Spec, write
from hymoe.convert.split import part_name
from hymoe.errors import HyError

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_head_kv": 1, "head_dim": 128, "n_embd": 256, "n_expert": 8}
# What a repaired file keeps as it finds it: who made it and from what, not what a reader needs to run it.
PROVENANCE = re.compile(r"(hymoe|quantize|split)\..*|general\.(name|basename|size_label|organization|source\..*)")
CLI = "import sys; from hymoe.convert.cli import main; sys.exit(main())"


def contents(gguf: Path) -> dict[str, Any]:
    """Every value with its type; read_head is compared with gguf-py's reader below, which is slow."""
    return {key: (entry.kind, entry.value) for key, entry in read_head(gguf).entries.items()}


def essential(gguf: Path) -> dict[str, Any]:
    return {key: value for key, value in contents(gguf).items() if not PROVENANCE.fullmatch(key)}


def check_tensors(before: Path, after: Path) -> None:
    """The same table and the same bytes behind it."""
    old, new = read_head(before), read_head(after)
    assert old.table == new.table
    assert before.read_bytes()[old.data_offset :] == after.read_bytes()[new.data_offset :]


def with_template(checkpoint: Path, template: str) -> Path:
    config = json.loads((checkpoint / "tokenizer_config.json").read_text("utf-8"))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return checkpoint


@pytest.fixture(scope="session")
def vendor(data: Path) -> str:
    return vendor_template(data)


@pytest.fixture(scope="session")
def ours(data: Path, vendor: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What hy-convert makes of a small checkpoint with the real vocabulary and template."""
    folder = tmp_path_factory.mktemp("ours")
    checkpoint = with_template(write(folder / "in", Spec(**SIZES, vocab=data / "a13b" / "hy.tiktoken")), vendor)
    convert(ConvertOptions(checkpoint, folder / "ours.gguf"))
    return folder / "ours.gguf"


@pytest.fixture(scope="session")
def foreign(ours: Path, vendor: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign(ours, tmp_path_factory.mktemp("foreign") / "foreign.gguf", template=vendor)


@pytest.fixture(scope="session")
def repaired(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repaired") / "out.gguf"
    assert main(["--repair", str(foreign), str(out), "-q"]) == 0
    return out


@pytest.mark.data
def test_the_result_is_what_ours_is(ours: Path, foreign: Path, repaired: Path) -> None:
    assert essential(repaired) == essential(ours)
    check_tensors(foreign, repaired)
    assert [file.name for file in repaired.parent.iterdir()] == ["out.gguf"]
    found, before = contents(repaired), contents(foreign)
    for key in ("general.name", "general.size_label"):
        assert found[key] == before[key]
    assert found["hymoe.repaired"][1] is True
    assert found["hymoe.chat_template"][1] == "repaired"


@pytest.mark.data
def test_files_of_2025_have_no_sampling_defaults(ours: Path, vendor: str, tmp_path: Path) -> None:
    foreign = write_foreign(ours, tmp_path / "foreign.gguf", template=vendor, old=True)
    changes = {change.key: change.after for change in repairs.examine(foreign).changes}
    wanted = {key: value for key, (_, value) in contents(ours).items() if "sampling" in key}
    assert len(wanted) == 5
    for key, value in wanted.items():
        assert changes[key] == pytest.approx(value, rel=1e-6)


@pytest.mark.data
def test_what_needs_nothing_is_left(
    ours: Path, repaired: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for fine in (ours, repaired):
        assert main(["--repair", str(fine), str(tmp_path / "out.gguf")]) == 0
        assert f"{fine} needs no repair" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.data
def test_dry_run_prints_the_changes(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repair", str(foreign), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for line in (
        "tokenizer.ggml.eot_token_id: none -> 127967",
        "tokenizer.ggml.merges: 127698 entries -> 127699 entries",
        "tokenizer.ggml.seperator_token_id: 127962 -> none",
        "general.sampling.penalty_last_n: none -> -1",
    ):
        assert line in out.splitlines()


@pytest.mark.data
def test_the_template_is_kept_by_choice(mini_gguf: Path, vendor: str, tmp_path: Path) -> None:
    foreign = write_foreign(mini_gguf, tmp_path / "foreign.gguf", template=vendor)
    out, mended = tmp_path / "out.gguf", tmp_path / "mended.gguf"
    assert main(["--repair", str(foreign), str(out), "--keep-template", "-q"]) == 0
    assert contents(out)["tokenizer.chat_template"][1] == vendor
    assert contents(out)["hymoe.chat_template"][1] == "vendor"
    assert main(["--repair", str(out), str(mended), "-q"]) == 0
    assert contents(mended)["tokenizer.chat_template"][1] == repair(vendor).text


def test_a_split_model(mini: Path, mini_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All parts are there afterwards, the first with the whole metadata."""
    limit = mini_gguf.stat().st_size // 3
    parts = convert(ConvertOptions(mini, tmp_path / "split.gguf", split_max_bytes=limit)).files
    assert len(parts) > 2
    mine = tmp_path / "first.gguf"
    shutil.move(parts[0], mine)
    write_foreign(mine, parts[0], template=fallback())
    assert main(["--repair", str(parts[0]), str(tmp_path / "out.gguf"), "-q"]) == 0
    written = [part_name(tmp_path / "out.gguf", i, len(parts)) for i in range(len(parts))]
    whole = write_foreign(mini_gguf, tmp_path / "whole.gguf", template=fallback())
    assert main(["--repair", str(whole), str(tmp_path / "one.gguf"), "-q"]) == 0
    assert essential(written[0]) == essential(tmp_path / "one.gguf")
    for before, after in zip(parts, written, strict=True):
        check_tensors(before, after)
    assert contents(written[0])["split.count"] == contents(mine)["split.count"]
    assert written[1].read_bytes() == parts[1].read_bytes()
    capsys.readouterr()
    assert "a later part" in fails(capsys, parts[1], tmp_path / "x.gguf")
    parts[2].unlink()
    assert "no such file" in fails(capsys, parts[0], tmp_path / "x.gguf")


def test_another_vocabulary_keeps_its_tokens(mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The miniature's ids are not guessed at; what the shapes say is written all the same."""
    convert(ConvertOptions(mini, tmp_path / "ours.gguf"))
    foreign = write_foreign(tmp_path / "ours.gguf", tmp_path / "foreign.gguf", template=fallback())
    assert main(["--repair", str(foreign), str(tmp_path / "out.gguf")]) == 0
    assert "tokens are not Hunyuan-A13B's vocabulary" in capsys.readouterr().err
    ours, out = essential(tmp_path / "ours.gguf"), essential(tmp_path / "out.gguf")
    lacking = {key for key in ours if key not in out}
    assert lacking == {
        *(f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_eos_token", "eot_token_id")),
        "general.sampling.penalty_last_n",
    }
    assert {key: value for key, value in ours.items() if key not in lacking} == out
    check_tensors(foreign, tmp_path / "out.gguf")
    for one, other in zip(GGUFReader(foreign).tensors, GGUFReader(tmp_path / "out.gguf").tensors, strict=True):
        assert (one.name, one.tensor_type, list(one.shape)) == (other.name, other.tensor_type, list(other.shape))
        assert np.array_equal(np.asarray(one.data), np.asarray(other.data)), one.name


@pytest.fixture
def small(mini_gguf: Path, tmp_path: Path) -> Path:
    """A foreign file with the miniature's vocabulary."""
    return write_foreign(mini_gguf, tmp_path / "small.gguf", template=fallback())


def fails(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    assert main(["--repair", *map(str, arguments)]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("error: ") for line in said) == 1
    return said[-1]


def test_outputs_that_are_refused(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the input itself" in fails(capsys, small, small)
    (tmp_path / "link.gguf").hardlink_to(small)
    assert "the input itself" in fails(capsys, small, tmp_path / "link.gguf", "--overwrite")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    assert "exists" in fails(capsys, small, tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    assert main(["--repair", str(small), str(tmp_path / "there.gguf"), "--overwrite", "-q"]) == 0
    check_tensors(small, tmp_path / "there.gguf")
    assert "no name of a GGUF" in fails(capsys, small, tmp_path / "out.bin")
    assert "no such folder" in fails(capsys, small, tmp_path / "nowhere" / "out.gguf")


def test_inputs_that_are_refused(
    small: Path, mini_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    assert "no such file" in fails(capsys, tmp_path / "absent.gguf", out)
    (tmp_path / "text.gguf").write_text("no model")
    assert "not a GGUF: got 'no m'" in fails(capsys, tmp_path / "text.gguf", out)
    raw = small.read_bytes()
    for n_bytes in (100, len(raw) // 2, len(raw) - 1000):
        (tmp_path / "cut.gguf").write_bytes(raw[:n_bytes])
        assert re.search("damaged|truncated", fails(capsys, tmp_path / "cut.gguf", out))
    (tmp_path / "other.gguf").write_bytes(raw.replace(b"hunyuan-moe", b"hunyuan-abc"))
    assert "architecture: got hunyuan-abc, expected hunyuan-moe" in fails(capsys, tmp_path / "other.gguf", out)
    one = write_foreign(mini_gguf, tmp_path / "one.gguf", template="x", changes={"hunyuan-moe.expert_used_count": 1})
    assert "expert_used_count: got 1, expected at least 2" in fails(capsys, one, out)
    no_base = write_foreign(mini_gguf, tmp_path / "no.gguf", template="x", changes={"hunyuan-moe.rope.freq_base": None})
    assert "got no hunyuan-moe.rope.freq_base" in fails(capsys, no_base, out)
    text = write_foreign(mini_gguf, tmp_path / "text.gguf", template="x", changes={"general.name": "m"})
    (tmp_path / "kind.gguf").write_bytes(
        text.read_bytes().replace(b"hunyuan-moe.block_count\x04\0\0\0", b"hunyuan-moe.block_count\x06\0\0\0")
    )
    said = fails(capsys, tmp_path / "kind.gguf", out)
    assert re.search(r"hunyuan-moe\.block_count: got \S+e-45, expected an integer", said)
    assert not out.exists()


def test_the_head_is_what_gguf_py_reads(small: Path) -> None:
    head, reader = read_head(small), GGUFReader(small)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: entry.value for key, entry in head.entries.items()} == {
        key: field.contents() for key, field in fields.items()
    }
    assert {key: entry.kind for key, entry in head.entries.items()} == {
        key: field.types[0] for key, field in fields.items()
    }
    assert head.shapes == {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    assert head.data_offset == reader.data_offset
    assert head.data_end <= small.stat().st_size


def test_damaged_heads_are_one_line(small: Path, tmp_path: Path) -> None:
    """Bytes changed and files cut anywhere: read as something, or refused; never a traceback."""
    random = Random(6)
    raw = small.read_bytes()
    n_head = read_head(small).data_offset
    refused = []
    for _ in range(300):
        spoiled = bytearray(raw if random.random() < 0.8 else raw[: random.randrange(n_head)])
        for _ in range(random.choice((1, 2, 8))):
            at = random.randrange(min(len(spoiled), random.choice((64, n_head))) or 1)
            spoiled[at : at + 1] = bytes([random.choice((0, 1, 255, random.randrange(256)))])
        (tmp_path / "spoiled.gguf").write_bytes(spoiled)
        try:
            repairs.examine(tmp_path / "spoiled.gguf")
        except HyError as exc:
            refused.append(str(exc))
    assert len(refused) > 100
    assert not any("\n" in line for line in refused)


def test_usage(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--quant", "Q8_0"], ["--verify"], ["--split-max-size", "1G"], ["--keep-shards"]):
        assert main(["--repair", str(small), str(tmp_path / "out.gguf"), *options]) == 2
        assert "does not go with --repair" in " ".join(capsys.readouterr().err.split())
    assert main(["--repair", str(small)]) == 2
    assert not (tmp_path / "out.gguf").exists()


def test_a_disk_that_fills_up_leaves_nothing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    limited = [sys.executable, "-c", f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, -1)); {CLI}"]
    done = subprocess.run([*limited, "--repair", small, out], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.gguf"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "disk too small" in fails(capsys, small, out)


def test_a_set_that_cannot_be_put_in_place_leaves_nothing(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last part is in place already when the first one, whose name is a folder's, is not to be had."""
    limit = 1_000_000
    parts = convert(ConvertOptions(mini, tmp_path / "split.gguf", split_max_bytes=limit)).files
    mine = tmp_path / "first.gguf"
    shutil.move(parts[0], mine)
    write_foreign(mine, parts[0], template=fallback())
    (tmp_path / "new").mkdir()
    out = tmp_path / "new" / "out.gguf"
    part_name(out, 0, len(parts)).mkdir()
    fails(capsys, parts[0], out, "--overwrite")
    assert [file.name for file in (tmp_path / "new").iterdir()] == [part_name(out, 0, len(parts)).name]


# VmHWM and not ru_maxrss, which a child takes over from its parent.
MEASURE = """
import re, sys
from hymoe.convert.cli import main
status = main()
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_file(mini: Path, tmp_path: Path) -> None:
    """Anonymous memory only: pages of the mapped input come and go as the system likes."""
    spec = Spec(n_layer=2, n_embd=1024, n_head=8, n_head_kv=4, head_dim=128, n_ff=1024, n_expert=32)
    convert(ConvertOptions(write(tmp_path / "in", spec), tmp_path / "big.gguf"))
    big = write_foreign(tmp_path / "big.gguf", tmp_path / "foreign.gguf", template=fallback())
    assert big.stat().st_size > 390_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "--repair", big, tmp_path / "out.gguf", "-q"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert int(done.stdout) * 1024 < 250_000_000
    check_tensors(big, tmp_path / "out.gguf")


def test_the_list_of_what_is_dropped_has_reasons() -> None:
    assert all(repairs.DROPPED.values())
