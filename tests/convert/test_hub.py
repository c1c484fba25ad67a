"""Converting from the hub, on a loopback stand-in: the bytes as from disk, little disk, and all that goes wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from convert.hub_server import FIRST_COMMIT, Content, Hub
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from hymoe.convert import hub as hub_module
from hymoe.convert import miniature, pieces, writer
from hymoe.convert.checkpoint import Checkpoint, Folder, TensorRef, list_tensors
from hymoe.convert.cli import main
from hymoe.convert.hub import RemoteFile, Repository, Streamed
from hymoe.convert.miniature import Spec

SPEC = Spec(n_layer=3, n_expert=6, max_shard_bytes=2 << 20)
CLI = """
import sys
from hymoe.convert import pieces, writer
from hymoe.convert.cli import main
writer.SYNC_SECONDS, pieces.PATIENCE_SECONDS = 0.05, 0.02
sys.exit(main())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the layout of the hub's cache, so that a conversion from disk knows the same origin."""
    root = tmp_path_factory.mktemp("cache") / "models--tencent--Mini" / "snapshots"
    return miniature.write(root / FIRST_COMMIT, SPEC)


@pytest.fixture(scope="module")
def from_disk(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("disk") / "out.gguf"
    assert main([str(checkpoint), str(out), "-q"]) == 0
    return out.read_bytes()


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import close_session, constants

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub_module, "BACKOFF", (0.01,) * 4)
    monkeypatch.setattr(writer, "SYNC_SECONDS", 0.05)
    monkeypatch.setattr(pieces, "PATIENCE_SECONDS", 0.02)
    with Hub(checkpoint).running() as running:
        # What the library makes of HF_ENDPOINT when it is imported; tests with a process of their own set that.
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        close_session()
        yield running
        close_session()


def shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def fails(capsys: pytest.CaptureFixture[str], argv: list[str], *parts: str) -> str:
    """The command must end with 1 and one line that has all parts."""
    capsys.readouterr()
    assert main(argv) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for part in parts:
        assert part in errors[0]
    return errors[0]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# --- the way through -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tencent/Mini", "tencent/Mini@main", f"tencent/Mini@{FIRST_COMMIT}"])
def test_same_bytes_as_from_disk(name: str, hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path) -> None:
    assert main([name, str(tmp_path / "out.gguf"), "-q"]) == 0
    assert (tmp_path / "out.gguf").read_bytes() == from_disk
    assert leftovers(tmp_path) == ["out.gguf"]
    for shard in shards(checkpoint):
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        assert shard.stat().st_size <= hub.served(shard.name) <= shard.stat().st_size + max(header, 128 << 10)


def test_origin_is_recorded(hub: Hub, tmp_path: Path) -> None:
    assert main(["tencent/Mini", str(tmp_path / "out.gguf"), "-q"]) == 0
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["hymoe.source.revision"].contents() == FIRST_COMMIT
    assert fields["general.source.repo_url"].contents() == "https://huggingface.co/tencent/Mini"


def test_quantized_as_from_disk(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    assert main(["tencent/Mini", str(tmp_path / "hub.gguf"), "--quant", "Q8_0", "-q"]) == 0
    assert main([str(checkpoint), str(tmp_path / "disk.gguf"), "--quant", "Q8_0", "-q"]) == 0
    assert (tmp_path / "hub.gguf").read_bytes() == (tmp_path / "disk.gguf").read_bytes()


def test_peak_disk(
    hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies on disk at any moment: at most the output and two shards (and the few small files)."""
    sizes = [shard.stat().st_size for shard in shards(checkpoint)]
    assert len(sizes) >= 5
    monkeypatch.setattr(writer, "SYNC_SECONDS", 0.3)  # shards come faster than they can go
    done, peak, most = threading.Event(), 0, 0

    def look() -> None:
        nonlocal peak, most
        while not done.wait(0.001):
            there = {}
            for folder, _, names in os.walk(tmp_path):  # it minds no folder that goes meanwhile
                for name in names:
                    with suppress(FileNotFoundError):
                        there[name] = (Path(folder) / name).stat().st_size
            peak = max(peak, sum(there.values()))
            most = max(most, sum(".safetensors" in name and "index" not in name for name in there))

    watcher = threading.Thread(target=look)
    watcher.start()
    assert main(["tencent/Mini", str(tmp_path / "out.gguf"), "-q"]) == 0
    done.set()
    watcher.join()
    small = sum(file.stat().st_size for file in checkpoint.iterdir() if file not in shards(checkpoint))
    assert most == 2
    assert len(from_disk) + min(sizes) < peak <= len(from_disk) + 2 * max(sizes) + small + 4096


def test_keep_shards(hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path) -> None:
    assert main(["tencent/Mini", str(tmp_path / "out.gguf"), "--keep-shards", "-q"]) == 0
    kept = tmp_path / "out.gguf.hub" / "models--tencent--Mini" / "snapshots" / FIRST_COMMIT
    for shard in shards(checkpoint):
        assert (kept / shard.name).read_bytes() == shard.read_bytes()
    assert main([str(kept), str(tmp_path / "again.gguf"), "-q"]) == 0
    assert (tmp_path / "again.gguf").read_bytes() == from_disk


def test_dry_run_fetches_headers_only(
    hub: Hub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tencent/Mini", "--dry-run"]) == 0
    out = capsys.readouterr().out
    pair = max(a.stat().st_size + b.stat().st_size for a, b in pairwise(shards(checkpoint)))
    assert "blk.*.ffn_down_exps.weight" in out
    assert f"{pair / 1e6:.1f} MB of it for the shards" in out
    assert "Not looked at" not in out
    assert all(hub.served(shard.name) <= 128 << 10 for shard in shards(checkpoint))
    assert leftovers(tmp_path) == []


def test_token_goes_to_the_hub_only(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["tencent/Mini", str(tmp_path / "out.gguf"), "-q"]) == 0
    assert {request.token for request in hub.requests if request.where == "hub"} == {"Bearer hf_secret"}
    assert {request.token for request in hub.requests if request.where == "cdn"} == {None}


def test_experts_of_a_tensor_anywhere(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """Shards in which tensors lie in no order at all, as a repository may have them."""
    mixed = tmp_path / "models--tencent--Mini" / "snapshots" / ("f" * 40)
    mixed.parent.mkdir(parents=True)
    shutil.copytree(checkpoint, mixed)
    shuffle_tensors(mixed)
    hub.versions["main"] = Content("f" * 40, mixed)
    (tmp_path / "out").mkdir()
    assert main(["tencent/Mini", str(tmp_path / "out" / "hub.gguf"), "-q"]) == 0
    assert main([str(mixed), str(tmp_path / "disk.gguf"), "-q"]) == 0
    assert (tmp_path / "out" / "hub.gguf").read_bytes() == (tmp_path / "disk.gguf").read_bytes()


def shuffle_tensors(folder: Path) -> None:
    """Deal all tensors out to the shards at random. numpy knows no BF16: as 16-bit integers the bytes pass through."""
    everything: dict[str, NDArray[Any]] = {}
    files = shards(folder)
    for file in files:
        rename_type(file, "BF16", "U16")
        everything |= load_file(file)
    names = sorted(everything)
    random.Random(3).shuffle(names)
    weight_map: dict[str, str] = {}
    for i, file in enumerate(files):
        mine = names[i :: len(files)]
        save_file({name: everything[name] for name in mine}, file)
        rename_type(file, "U16", "BF16")
        weight_map |= dict.fromkeys(mine, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def rename_type(file: Path, old: str, new: str) -> None:
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + n].replace(f'"{old}"'.encode(), f'"{new}"'.encode())
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + n :])


# --- what goes wrong on the way --------------------------------------------------------------------------------------


def test_dropped_connections_are_continued_by_range(
    hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path
) -> None:
    victim = shards(checkpoint)[1].name
    # the first request is for the header
    hub.faults.drop_after[victim] = [1 << 30, 300_000, 0, 100_000]
    assert main(["tencent/Mini", str(tmp_path / "out.gguf"), "-q"]) == 0
    assert (tmp_path / "out.gguf").read_bytes() == from_disk
    starts = [request.start for request in hub.requests if request.where == "cdn" and request.file == victim]
    assert starts == [0, 0, 300_000, 300_000, 400_000]


def test_server_that_ignores_ranges_for_weights(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """A proxy may: a part is thrown away then, and the plan, which needs headers by range, cannot be made."""
    repository = hub_module.open_repository("tencent/Mini", None, tmp_path)
    victim = shards(checkpoint)[0]
    hub.faults.drop_after[victim.name] = [300_000]
    hub.faults.ignore_range = True
    fetched = repository.fetch(victim.name, threading.Event())
    assert fetched.read_bytes() == victim.read_bytes()


def test_wrong_bytes_once(
    hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = shards(checkpoint)[2].name
    hub.faults.corrupt[victim] = [False, True]
    assert main(["tencent/Mini", str(tmp_path / "out.gguf")]) == 0
    assert f"{victim}: its hash is wrong; fetching it again" in capsys.readouterr().err
    assert (tmp_path / "out.gguf").read_bytes() == from_disk


def test_wrong_bytes_twice(
    hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was converted before stays, and the next run goes on with it."""
    victim = shards(checkpoint)[3]
    hub.faults.corrupt[victim.name] = [False, True, True]
    sha = next(s["lfs"]["sha256"] for s in hub.versions["main"].siblings if s["rfilename"] == victim.name)
    argv = ["tencent/Mini", str(tmp_path / "out.gguf")]
    fails(capsys, argv, victim.name, "damaged twice", f"expected {sha}")
    assert not (tmp_path / "out.gguf").exists()
    before = {shard.name: hub.served(shard.name) for shard in shards(checkpoint)[:3]}
    assert main([*argv, "-q"]) == 0
    assert (tmp_path / "out.gguf").read_bytes() == from_disk
    # of the shards that were consumed, only headers were read again
    assert all(hub.served(name) - served <= 128 << 10 for name, served in before.items())


def test_wrong_bytes_in_a_small_file(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults.corrupt["config.json"] = [True, True]
    fails(capsys, ["tencent/Mini", str(tmp_path / "out.gguf")], "config.json", "damaged twice")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_asked_again(status: int, hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path) -> None:
    hub.faults.status["Mini"] = [status]
    hub.faults.status["config.json"] = [status]
    hub.faults.status[shards(checkpoint)[1].name] = [0, 0, status, status]
    assert main(["tencent/Mini", str(tmp_path / "out.gguf"), "-q"]) == 0
    assert (tmp_path / "out.gguf").read_bytes() == from_disk


def test_network_that_does_not_come_back(
    hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = shards(checkpoint)[2].name
    hub.faults.drop_after[victim] = [1 << 30, 200_000, *[0] * 5]
    argv = ["tencent/Mini", str(tmp_path / "out.gguf")]
    fails(capsys, argv, victim, "run the same command again: it continues")
    assert (tmp_path / "out.gguf.hub").is_dir()
    assert main(argv) == 0
    assert "continuing" in capsys.readouterr().err
    assert (tmp_path / "out.gguf").read_bytes() == from_disk
    assert leftovers(tmp_path) == ["out.gguf"]
    starts = [request.start for request in hub.requests if request.where == "cdn" and request.file == victim]
    assert starts[-1] == 200_000  # what there was of the shard was not fetched again


def test_a_branch_that_moves_meanwhile(
    hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commit is pinned when a conversion begins; one that is continued stays with it."""
    victim = shards(checkpoint)[2].name
    hub.faults.drop_after[victim] = [1 << 30, 200_000, *[0] * 5]
    argv = ["tencent/Mini", str(tmp_path / "out.gguf")]
    assert main(argv) == 1
    other = miniature.write(tmp_path / "other", Spec(n_layer=3, n_expert=6, max_shard_bytes=2 << 20, seed=1))
    hub.versions = {"main": Content("e" * 40, other), "old": hub.versions["main"]}
    fails(capsys, [*argv, "--revision", "main"], "was begun", "--restart")
    assert main([*argv, "-q"]) == 0
    assert (tmp_path / "out.gguf").read_bytes() == from_disk


def test_restart_forgets_the_commit(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.faults.drop_after[shards(checkpoint)[2].name] = [1 << 30, 200_000, *[0] * 5]
    argv = ["tencent/Mini", str(tmp_path / "out.gguf"), "-q"]
    assert main(argv) == 1
    other = miniature.write(tmp_path / "other", Spec(n_layer=1, seed=1))
    hub.versions["main"] = Content("e" * 40, other)
    assert main([*argv, "--restart"]) == 0
    assert GGUFReader(tmp_path / "out.gguf").fields["hymoe.source.revision"].contents() == "e" * 40


def is_served(hub: Hub, name: str, n_bytes: int) -> bool:
    return hub.served(name) > n_bytes


def command(hub: Hub, *argv: str) -> subprocess.Popen[str]:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen([sys.executable, "-c", CLI, *argv], env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_again_and_again(
    how: signal.Signals, hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path
) -> None:
    """In the middle of every second shard or so; the last run must give the bytes of an undisturbed one."""
    hub.faults.seconds_per_piece = 0.01
    argv = ("tencent/Mini", str(tmp_path / "out.gguf"))
    for victim in shards(checkpoint)[1::2]:
        process = command(hub, *argv)
        wait_until(partial(is_served, hub, victim.name, 400_000))
        process.send_signal(how)
        process.communicate(timeout=20)
        assert process.returncode in (-how, 130)
        assert not (tmp_path / "out.gguf").exists()
    hub.faults.seconds_per_piece = 0
    process = command(hub, *argv)
    assert process.wait(timeout=60) == 0, process.stderr and process.stderr.read()
    process.communicate()
    assert (tmp_path / "out.gguf").read_bytes() == from_disk
    assert leftovers(tmp_path) == ["out.gguf"]


def test_interrupted_in_the_first_shard(hub: Hub, from_disk: bytes, checkpoint: Path, tmp_path: Path) -> None:
    """Nothing is converted yet; what was fetched of the shard is kept all the same."""
    hub.faults.seconds_per_piece = 0.02
    victim, argv = shards(checkpoint)[0].name, ("tencent/Mini", str(tmp_path / "out.gguf"))
    process = command(hub, *argv)
    wait_until(partial(is_served, hub, victim, 400_000))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.count("interrupted; run the same command again: it continues") == 1
    assert leftovers(tmp_path) == ["out.gguf.hub"]
    hub.faults.seconds_per_piece = 0
    assert main([*argv, "-q"]) == 0
    assert (tmp_path / "out.gguf").read_bytes() == from_disk
    starts = [request.start for request in hub.requests if request.where == "cdn" and request.file == victim]
    assert starts[-1] is not None
    assert starts[-1] > 100_000


def test_full_disk(
    hub: Hub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["tencent/Mini", str(tmp_path / "out.gguf")]
    victim, write_all = shards(checkpoint)[2].name, hub_module._write_all

    def full(out: Any, piece: bytes) -> None:
        if Path(out.name).name.startswith(victim):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(out, piece)

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "_write_all", full)
        fails(capsys, argv, f"{victim}.part: No space left on device", "free some space", "it continues")
    assert main([*argv, "-q"]) == 0
    assert leftovers(tmp_path) == ["out.gguf"]


def test_two_at_once(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("tencent/Mini", str(tmp_path / "out.gguf"))
    hub.faults.seconds_per_piece = 0.05
    process = command(hub, *argv)
    wait_until(lambda: (tmp_path / "out.gguf.hub" / "lock").exists() and hub.served("config.json") > 0)
    fails(capsys, list(argv), "another hy-convert is using it")
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_bad_input_leaves_nothing(
    hub: Hub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    config = (broken / "config.json").read_text().replace('"silu"', '"gelu"')
    (broken / "config.json").write_text(config)
    hub.versions["broken"] = Content("b" * 40, broken)
    (tmp_path / "out").mkdir()
    fails(capsys, ["tencent/Mini@broken", str(tmp_path / "out" / "out.gguf")], "hidden_act")
    assert leftovers(tmp_path / "out") == []


# --- what cannot be had ----------------------------------------------------------------------------------------------


def gated(hub: Hub) -> None:
    hub.faults.token = "hf_secret"


def refused(hub: Hub) -> None:
    hub.faults.status["Mini"] = [401]


def forbidden(hub: Hub) -> None:
    hub.faults.status["Mini"] = [403]


def nothing(_hub: Hub) -> None:
    pass


def down(hub: Hub) -> None:
    hub.faults.down = True


def gone(hub: Hub) -> None:
    hub.faults.status["config.json"] = [404]


REFUSALS = {
    "gated": (gated, "tencent/Mini", ("tencent/Mini: gated", "accept its terms", "hf auth login", "HF_TOKEN")),
    "401": (refused, "tencent/Mini", ("tencent/Mini", "401", "hf auth login")),
    "403": (forbidden, "tencent/Mini", ("tencent/Mini", "403", "HF_TOKEN")),
    "404": (nothing, "tencent/Maxi", ("tencent/Maxi: no such folder, and no such repository", "check the spelling")),
    "revision": (nothing, "tencent/Mini@v2", ("tencent/Mini: no revision v2", "a branch, a tag or a commit")),
    "a file that went away": (gone, "tencent/Mini", ("tencent/Mini", "404")),
    "unreachable": (down, "tencent/Mini", ("tencent/Mini: http://127.0.0.1:", "when the network is back")),
    "three parts": (nothing, "a/b/c", ("a/b/c: got no such folder", "a repository as org/name")),
    "one part": (nothing, "Hunyuan", ("Hunyuan: got no such folder", "a repository as org/name")),
    "no name": (nothing, "tencent/--", ("tencent/--",)),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("dry", [False, True])
def test_refused(name: str, dry: bool, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault, model, parts = REFUSALS[name]
    fault(hub)
    fails(capsys, [model, "--dry-run"] if dry else [model, str(tmp_path / "out.gguf")], *parts)
    assert leftovers(tmp_path) == []


def test_gated_with_a_token_that_may_not(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gated(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    error = fails(capsys, ["tencent/Mini", str(tmp_path / "out.gguf")], "gated", "accept its terms")
    assert "hf_other" not in error


def test_offline(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, "-c", CLI, "tencent/Mini", str(tmp_path / "out.gguf")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        "error: tencent/Mini: no such folder, and the hub is off limits: HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE, "
        "or give a folder\n"
    )


def test_revision_of_a_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, [str(checkpoint), str(tmp_path / "out.gguf"), "--revision", "main"], "--revision main", "a folder")


# --- the order in which shards come ----------------------------------------------------------------------------------


class Piece:
    def __init__(self, *refs: TensorRef) -> None:
        self.refs = refs


class Instant(Repository):
    """Fetches at once, and notes how many shards there are at a time."""

    def fetch(self, name: str, _stop: threading.Event) -> Path:
        (self.folder / name).write_bytes(b"x" * 8)
        peaks.append(len(list(self.folder.iterdir())))
        return self.folder / name


peaks: list[int] = []


def test_pieces_that_span_shards(tmp_path: Path) -> None:
    """A scale may lie in another shard than its weights, even far away: no deadlock, and two shards where two do."""
    names = [f"{i}.safetensors" for i in range(8)]
    refs = [TensorRef(f"t{i}", tmp_path / name, "U8", (8,), 0, 8) for i, name in enumerate(names)]
    files = {name: RemoteFile(name, 8, "", lfs=True) for name in names}
    rng = random.Random(0)
    for span, most in ((1, 2), (2, 2), (4, 4), (8, 8)):
        peaks.clear()
        pieces = [Piece(*refs[i : i + span]) for i in range(8 - span + 1)] + [Piece(ref) for ref in refs]
        rng.shuffle(pieces)
        repository = Instant("tencent/Mini", FIRST_COMMIT, tmp_path, files)
        with Streamed(tmp_path, {ref.name: ref for ref in refs}, repository=repository) as streamed:
            for piece in streamed.arrange(pieces):
                streamed.require(piece)
                for ref in piece.refs:
                    streamed.read_into(ref, 0, memoryview(bytearray(8)))
                streamed.finished(piece)
        assert max(peaks) <= most
        assert list(tmp_path.iterdir()) == []


def test_stop_lets_waiting_threads_go(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.faults.seconds_per_piece = 0.2
    repository = hub_module.open_repository("tencent/Mini", None, tmp_path)
    tensors = list_tensors(Folder(checkpoint))
    refs = {name: replace(ref, file=repository.folder / ref.file.name) for name, ref in tensors.items()}
    streamed: Checkpoint = repository.checkpoint(refs)
    ended: list[BaseException] = []

    def wait(piece: Piece) -> None:
        try:
            streamed.require(piece)
        except Exception as exc:
            ended.append(exc)

    with streamed:
        pieces = streamed.arrange([Piece(ref) for ref in refs.values()])
        waiting = threading.Thread(target=wait, args=(pieces[-1],))
        waiting.start()
        begun = time.monotonic()
        streamed.stop()
        waiting.join(5)
        assert not waiting.is_alive()
    assert len(ended) == 1
    assert time.monotonic() - begun < 5
