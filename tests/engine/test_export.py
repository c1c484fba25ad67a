"""The source as one archive: small, the same each time, with its licences, and built by its own script."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import cmake as cmake_wheel
import httpx
import ninja
import pytest
from tiny_model import write_model

from hymoe.chat_templates import fallback
from hymoe.engine import cli, cmake, export, patches
from hymoe.runtime.server import ServerOptions, serve

ROOT = Path(__file__).resolve().parents[2]
LICENCES = ("LICENSE", "LICENSE-hymoe", "licenses/LICENSE-jsonhpp", "vendor/cpp-httplib/LICENSE")

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("export") / "engine.tar.gz"
    assert cli.main(["export", str(file), "-q"]) == 0
    return file


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / export.TOP


def test_it_is_small_and_the_same_each_time(archive: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tar.gz"
    assert export.export(again) == archive.stat().st_size < 10_000_000
    assert again.read_bytes() == archive.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["again.tar.gz"]


def test_licences_and_our_changes_are_inside(unpacked: Path) -> None:
    for name in LICENCES:
        assert (unpacked / name).stat().st_size > 500
    assert (unpacked / "LICENSE-hymoe").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for new in patches.new_files():
        assert (unpacked / new).read_bytes() == (patches.FOLDER / "new" / new).read_bytes()
    assert "hymoe_drain" in (unpacked / "tools/server/server.cpp").read_text()  # a patch is applied


def test_the_archive_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "none" / "engine.tar.gz"
    assert cli.main(["export", str(file)]) == 1
    assert capsys.readouterr().err == f"error: {file}: cannot be written: got No such file or directory\n"


@pytest.mark.parametrize("words", [[], ["cpu"], ["riscv", "out"]])
def test_the_script_says_how_it_is_used(unpacked: Path, words: list[str]) -> None:
    done = subprocess.run(["sh", unpacked / "build.sh", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "usage: sh build.sh cpu|cuda|vulkan|metal DIR [CMake arguments]\n"


def build(unpacked: Path, into: Path, targets: str = "") -> None:
    """Run the script in an environment without a network: what it would fetch, it cannot."""
    tools = f"{cmake_wheel.CMAKE_BIN_DIR}:{ninja.BIN_DIR}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": tools,
        "CMAKE_GENERATOR": "Ninja",
        "JOBS": "2",
        "https_proxy": "http://[::1]:9",
    }
    environment |= {"TARGETS": targets} if targets else {}
    done = subprocess.run(
        ["sh", unpacked / "build.sh", "cpu", into],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.endswith(f"built: export HYMOE_ENGINE={into}\n")


def test_it_configures_and_builds_a_library(unpacked: Path, tmp_path: Path) -> None:
    build(unpacked, tmp_path / "out", "vendor-hash")  # a small one: what is missing elsewhere shows in the first step
    assert list(unpacked.glob("build-cpu/**/libvendor-hash.a"))
    # Every source of every target is there: ninja looks for them, and does nothing else.
    words = [f"{ninja.BIN_DIR}/ninja", "-n", "-C", str(unpacked / "build-cpu"), *cmake.TARGETS, *cmake.OUR_TARGETS]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.long
def test_all_of_it_builds_and_serves(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(unpacked, tmp_path / "out")
    monkeypatch.setenv("HYMOE_ENGINE", str(tmp_path / "out"))
    assert cli.main(["info"]) == 0
    model = write_model(tmp_path / "tiny.gguf", template=fallback())
    with serve(model) as endpoint:
        answer = httpx.post(f"{endpoint.url}/completion", json={"prompt": "Hello", "n_predict": 4}, trust_env=False)
    assert len(answer.json()["content"]) == 4
    with serve(ServerOptions(model, port=0)) as endpoint:
        assert httpx.get(f"{endpoint.url}/health", trust_env=False).json() == {"status": "ok"}
