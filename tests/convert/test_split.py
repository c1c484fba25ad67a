"""Split files: names, metadata and sizes that llama.cpp takes as they are, and no set that is less than whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
from gguf import GGUFReader
from interruptible import interrupt, run

from hymoe import engine
from hymoe.convert import miniature
from hymoe.convert.cli import main
from hymoe.convert.miniature import Spec
from hymoe.sizes import parse_size

SPEC = Spec(n_layer=2, n_embd=64, n_head=2, n_head_kv=1, head_dim=32, n_ff=32, n_expert=4, n_expert_used=2, n_rank=300)
LIMIT = 83_000  # holds every tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("split") / "in", SPEC)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The same model in one file."""
    out = folder.parent / "whole.gguf"
    assert main([str(folder), str(out), "-q"]) == 0
    return out


@pytest.fixture(scope="module")
def parts(folder: Path) -> list[Path]:
    """The model in parts."""
    (folder.parent / "set").mkdir()
    assert main([str(folder), str(folder.parent / "set" / "model.gguf"), "--split-max-size", str(LIMIT), "-q"]) == 0
    return sorted((folder.parent / "set").iterdir())


def tensors(*files: Path) -> dict[str, bytes]:
    """Name and bytes of every tensor, in order of the files."""
    return {tensor.name: tensor.data.tobytes() for file in files for tensor in GGUFReader(file).tensors}


def test_names_metadata_and_tensors(whole: Path, parts: list[Path]) -> None:
    count = len(parts)
    assert count > 3
    assert [part.name for part in parts] == [f"model-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    expected = tensors(whole)
    assert list(tensors(*parts).items()) == list(expected.items())
    for i, part in enumerate(parts):
        fields = GGUFReader(part).fields
        found = {name: (fields[name].contents(), fields[name].types[0].name) for name in fields if "split." in name}
        assert found == {
            "split.no": (i, "UINT16"),
            "split.count": (count, "UINT16"),
            "split.tensors.count": (len(expected), "INT32"),
        }
    first, single = GGUFReader(parts[0]).fields, GGUFReader(whole).fields
    metadata = [name for name in single if not name.startswith("GGUF.")]
    assert [name for name in first if not name.startswith(("GGUF.", "split."))] == metadata
    assert all(first[name].contents() == single[name].contents() for name in metadata)


def test_sizes(parts: list[Path]) -> None:
    """No part is larger than asked for, but one of a single tensor; no two neighbours would have fitted into one."""
    sizes = [part.stat().st_size for part in parts]
    counts = [len(GGUFReader(part).tensors) for part in parts]
    assert all(size <= LIMIT or count == 1 for size, count in zip(sizes, counts, strict=True))
    for part, following in pairwise(parts):
        room = LIMIT - part.stat().st_size
        tensor = GGUFReader(following).tensors[0]
        entry = 8 + len(tensor.name) + 4 + 8 * len(tensor.shape) + 12
        assert tensor.n_bytes + entry + 32 > room


def test_tensor_larger_than_the_limit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), str(tmp_path / "model.gguf"), "--split-max-size", "20K"]) == 0
    err = capsys.readouterr().err
    count = len(list(tmp_path.iterdir()))
    line = (
        rf"warning: model-00001-of-{count:05d}\.gguf has [\d.]+ KB: token_embd\.weight with the file's head is larger"
    )
    assert re.search(line, err)
    assert [tensor.name for tensor in GGUFReader(sorted(tmp_path.iterdir())[0]).tensors] == ["token_embd.weight"]


def test_one_file_where_it_fits(folder: Path, whole: Path, tmp_path: Path) -> None:
    """No parts of one: the plain name and the same bytes."""
    size = whole.stat().st_size
    assert main([str(folder), str(tmp_path / "model.gguf"), "--split-max-size", str(size), "-q"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_bytes() == whole.read_bytes()
    assert main([str(folder), str(tmp_path / "two.gguf"), "--split-max-size", str(size - 1), "-q"]) == 0
    assert len(list(tmp_path.glob("two-0000?-of-00002.gguf"))) == 2


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("48G", 48_000_000_000), ("500M", 500_000_000), ("2k", 2000), ("123", 123), ("1GB", 10**9)]
)
def test_size_as_people_write_it(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["0", "-1", "", "G", "1.5G", "48T", "1e9", "0x10"])
def test_no_size(text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), str(tmp_path / "out.gguf"), f"--split-max-size={text}"]) == 2
    assert f"{text!r} is no size: give bytes, or a number with K, M or G" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_existing_part_is_refused(
    folder: Path, parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / parts[2].name
    taken.write_bytes(b"precious")
    command = [str(folder), str(tmp_path / "model.gguf"), "--split-max-size", str(LIMIT), "-q"]
    assert main(command) == 1
    assert capsys.readouterr().err == f"error: {taken} exists; choose another name, or pass --overwrite\n"
    assert list(tmp_path.iterdir()) == [taken]
    assert main([*command, "--overwrite"]) == 0
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [path.read_bytes() for path in parts]


def test_interrupted_set_goes_on(folder: Path, parts: list[Path], tmp_path: Path) -> None:
    """No part has its name before all are whole; afterwards they are what an uninterrupted run writes."""
    out = tmp_path / "model.gguf"
    command = [folder, out, "--split-max-size", LIMIT]
    for _ in range(2):
        status, err = interrupt(command, 0.2, signal.SIGKILL, pace=0.015, sync=0.02)
        assert status == -signal.SIGKILL, err
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == sorted(["model.gguf.journal", *(f"{part.name}.part" for part in parts)])
    status, _, err = run(command)
    assert status == 0, err
    assert err.startswith("continuing: ")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [part.name for part in parts]
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [part.read_bytes() for part in parts]


@pytest.mark.parametrize("n_renamed", [0, 1, 3])
def test_power_cut_between_the_renames(
    n_renamed: int, folder: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part gets its name last: until then nothing loads, and the same command completes the set."""
    replace, done = Path.replace, list[str]()

    def cut_off(self: Path, target: Path) -> Path:
        if len(done) == n_renamed:
            raise KeyboardInterrupt
        done.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut_off)
    command = [str(folder), str(tmp_path / "model.gguf"), "--split-max-size", str(LIMIT), "-q"]
    assert main(command) == 130
    monkeypatch.undo()
    assert done == [part.name for part in reversed(parts)][:n_renamed]
    assert not (tmp_path / parts[0].name).exists()
    assert main(command) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == [part.name for part in parts]
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [part.read_bytes() for part in parts]


def test_restart_removes_the_parts_of_the_former_set(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    interrupt([folder, out, "--split-max-size", LIMIT], 0.2, signal.SIGKILL, pace=0.015, sync=0.02)
    assert len(list(tmp_path.glob("*.part"))) > 1
    assert main([str(folder), str(out), "--restart", "-q"]) == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.engine
def test_the_engine_loads_it(whole: Path, parts: list[Path]) -> None:
    n_params = sum(tensor.n_elements for tensor in GGUFReader(whole).tensors)
    for model in (whole, parts[0]):
        command = [str(engine.find().tool("llama-bench")), "-m", str(model), "-p", "8", "-n", "2", "-o", "json"]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        assert done.returncode == 0, done.stderr
        assert {entry["model_n_params"] for entry in json.loads(done.stdout)} == {n_params}
    missing = parts[-1].rename(parts[-1].with_suffix(".away"))
    try:
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        assert done.returncode != 0
    finally:
        missing.rename(parts[-1])


@pytest.mark.engine
def test_the_server_answers_alike(whole: Path, parts: list[Path]) -> None:
    from hymoe.runtime.server import ServerOptions, serve

    answers = []
    for model in (whole, parts[0]):
        with serve(ServerOptions(model, port=0, threads=1)) as endpoint:
            body = json.dumps({"prompt": "The lamp", "n_predict": 12, "temperature": 0}).encode()
            headers = {"Content-Type": "application/json"}
            if endpoint.api_key:
                headers["Authorization"] = f"Bearer {endpoint.api_key}"
            request = urllib.request.Request(f"{endpoint.url}/completion", body, headers)
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=60) as response:
                answers.append(json.load(response)["tokens_predicted"])
    assert answers[0] == answers[1] > 0


def test_a_part_is_no_place_for_a_link_to_elsewhere(folder: Path, tmp_path: Path) -> None:
    """A journal that somebody else wrote must not make --restart delete files outside the folder."""
    from hymoe.convert.journal import open_journal

    (tmp_path / "elsewhere").mkdir()
    victim = tmp_path / "elsewhere" / "victim.part"
    victim.write_bytes(b"precious")
    out = tmp_path / "out.gguf"
    with open_journal(
        Path(f"{out}.journal"), ["elsewhere/victim", os.fspath(victim)[:-5]], {}, restart=False
    ) as journal:
        journal.begin()
    assert main([str(folder), str(out), "--restart", "-q"]) == 0
    assert victim.read_bytes() == b"precious"
