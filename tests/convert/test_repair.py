"""hy-convert --repair: a GGUF of another tool gets the metadata that ours writes; its weights stay."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
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
from hymoe.convert.miniature import Spec, write
from hymoe.convert.split import part_name

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_head_kv": 1, "head_dim": 128, "n_embd": 256, "n_expert": 8}
# What a repaired file keeps as it finds it: who made it and from what, not what a reader needs to run it.
PROVENANCE = re.compile(r"(hymoe|quantize|split)\..*|general\.(name|basename|size_label|organization|source\..*)")
CLI = "import sys; from hymoe.convert.cli import main; sys.exit(main())"


def contents(gguf: Path) -> dict[str, Any]:
    """Every value with its type."""
    fields = GGUFReader(gguf).fields
    return {key: (field.types, field.contents()) for key, field in fields.items() if not key.startswith("GGUF.")}


def essential(gguf: Path) -> dict[str, Any]:
    return {key: value for key, value in contents(gguf).items() if not PROVENANCE.fullmatch(key)}


def check_tensors(before: Path, after: Path) -> None:
    old, new = GGUFReader(before).tensors, GGUFReader(after).tensors
    assert [tensor.name for tensor in old] == [tensor.name for tensor in new]
    for one, other in zip(old, new, strict=True):
        assert (one.tensor_type, list(one.shape)) == (other.tensor_type, list(other.shape))
        assert np.array_equal(np.asarray(one.data), np.asarray(other.data)), one.name


def with_template(checkpoint: Path, template: str) -> Path:
    config = json.loads((checkpoint / "tokenizer_config.json").read_text("utf-8"))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return checkpoint


@pytest.fixture(scope="session")
def vendor(data: Path) -> str:
    return vendor_template(data, "a13b")


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


@pytest.mark.data
@pytest.mark.parametrize("old", [False, True], ids=["2026", "2025"])
def test_the_result_is_what_ours_is(
    ours: Path, vendor: str, tmp_path: Path, old: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = write_foreign(ours, tmp_path / "foreign.gguf", template=vendor, old=old)
    before = foreign.read_bytes()
    assert main(["--repair", str(foreign), str(tmp_path / "out.gguf")]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "metadata entries changed, every weight as it was" in said.err
    assert essential(tmp_path / "out.gguf") == essential(ours)
    check_tensors(foreign, tmp_path / "out.gguf")
    assert foreign.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["foreign.gguf", "out.gguf"]
    found = contents(tmp_path / "out.gguf")
    for key in ("general.name", "general.size_label"):
        assert found[key] == contents(foreign)[key]
    assert found["hymoe.repaired"][1] is True
    assert found["hymoe.chat_template"][1] == "repaired"


@pytest.mark.data
def test_what_needs_nothing_is_left(
    ours: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--repair", str(ours), str(tmp_path / "out.gguf")]) == 0
    assert f"{ours} needs no repair" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["--repair", str(foreign), str(tmp_path / "once.gguf"), "-q"]) == 0
    assert main(["--repair", str(tmp_path / "once.gguf"), str(tmp_path / "twice.gguf")]) == 0
    assert "needs no repair" in capsys.readouterr().err
    assert not (tmp_path / "twice.gguf").exists()


@pytest.mark.data
def test_dry_run_prints_the_changes(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repair", str(foreign), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for line in (
        "tokenizer.ggml.eot_token_id: none -> 127967",
        "tokenizer.ggml.merges: 127698 entries -> 127699 entries",
        "tokenizer.ggml.seperator_token_id: 127962 -> none",
        "general.sampling.penalty_last_n: none -> -1",
    ):
        assert line in out.splitlines()
    assert not list(tmp_path.iterdir())


@pytest.mark.data
def test_keep_template(foreign: Path, vendor: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert main(["--repair", str(foreign), str(out), "--keep-template", "-q"]) == 0
    assert contents(out)["tokenizer.chat_template"][1] == vendor
    assert contents(out)["hymoe.chat_template"][1] == "vendor"
    assert main(["--repair", str(out), str(tmp_path / "mended.gguf"), "-q"]) == 0
    assert contents(tmp_path / "mended.gguf")["tokenizer.chat_template"][1] == repair(vendor).text


@pytest.mark.data
def test_a_split_model(foreign: Path, ours: Path, data: Path, vendor: str, tmp_path: Path) -> None:
    """All parts are there afterwards, the first with the whole metadata."""
    checkpoint = with_template(write(tmp_path / "in", Spec(**SIZES, vocab=data / "a13b" / "hy.tiktoken")), vendor)
    whole = tmp_path / "split.gguf"
    parts = convert(ConvertOptions(checkpoint, whole, split_max_bytes=60_000_000)).files
    assert len(parts) > 2
    mine = tmp_path / "first.gguf"
    shutil.move(parts[0], mine)
    write_foreign(mine, parts[0], template=vendor)
    assert main(["--repair", str(parts[0]), str(tmp_path / "out.gguf"), "-q"]) == 0
    written = [part_name(tmp_path / "out.gguf", i, len(parts)) for i in range(len(parts))]
    assert {key: value for key, value in essential(written[0]).items()} == essential(ours)
    for before, after in zip(parts, written, strict=True):
        check_tensors(before, after)
    assert contents(written[0])["split.count"] == contents(mine)["split.count"]
    assert main(["--repair", str(parts[1]), str(tmp_path / "x.gguf"), "-q"]) == 1
    parts[2].unlink()
    assert main(["--repair", str(parts[0]), str(tmp_path / "x.gguf"), "-q"]) == 1


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
    assert "no GGUF" in fails(capsys, tmp_path / "text.gguf", out)
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
    assert not out.exists()


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
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    assert "disk too small" in fails(capsys, small, out)


# VmHWM and not ru_maxrss, which a child takes over from its parent.
MEASURE = """
import re, sys
from hymoe.convert.cli import main
status = main()
print(re.search(r"VmHWM:\\\\s+(\\\\d+)", open("/proc/self/status").read())[1])
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_file(mini: Path, tmp_path: Path) -> None:
    """Anonymous memory only: pages of the mapped input come and go as the system likes."""
    spec = Spec(n_layer=2, n_embd=1024, n_head=8, n_head_kv=4, head_dim=128, n_ff=1024, n_expert=64)
    convert(ConvertOptions(write(tmp_path / "in", spec), tmp_path / "big.gguf"))
    big = write_foreign(tmp_path / "big.gguf", tmp_path / "foreign.gguf", template=fallback())
    assert big.stat().st_size > 700_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "--repair", big, tmp_path / "out.gguf", "-q"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert int(done.stdout) * 1024 < 300_000_000
    check_tensors(big, tmp_path / "out.gguf")


def test_the_list_of_what_is_dropped_has_reasons() -> None:
    assert all(repairs.DROPPED.values())
