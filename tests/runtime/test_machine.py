"""The hardware probe: this machine, machines made of files, and machines on paper."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rpc_worker import rpc_worker

from hymoe import engine
from hymoe.errors import ServerError
from hymoe.runtime import bandwidth, machine, measuring, quiet
from hymoe.runtime.bandwidth import Pace
from hymoe.runtime.machine import Device, Machine

KIB = 1024
MEMINFO = "MemTotal:       65536000 kB\nMemFree:         1000000 kB\nMemAvailable:   60000000 kB\n"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "total", "usable"),
    [
        pytest.param({}, 65536000 * KIB, 60000000 * KIB, id="no limit"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/user/session\n",
                "sys/fs/cgroup/user/memory.max": f"{32 << 30}\n",
                "sys/fs/cgroup/user/memory.current": f"{6 << 30}\n",
                # pages of files that can go: 1 + 2 GiB
                "sys/fs/cgroup/user/memory.stat": f"anon 5\nactive_file {1 << 30}\ninactive_file {2 << 30}\n",
                "sys/fs/cgroup/user/session/memory.max": "max\n",
                "sys/fs/cgroup/user/session/memory.current": "4096\n",
            },
            32 << 30,
            29 << 30,
            id="version 2, of the parent",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/../../somewhere/of/the/host\n",
                "sys/fs/cgroup/memory.max": f"{8 << 30}\n",
                "sys/fs/cgroup/memory.current": f"{9 << 30}\n",
            },
            8 << 30,
            0,
            id="version 2, in a container that is over its limit",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "7:cpu,cpuacct:/box\n4:memory:/box\n1:name=systemd:/box\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{16 << 30}\n",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{5 << 30}\n",
                "sys/fs/cgroup/memory/box/memory.stat": f"active_file 7\ntotal_inactive_file {1 << 30}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "123\n",
            },
            16 << 30,
            12 << 30,
            id="version 1",
        ),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], total: int, usable: int) -> None:
    assert machine.memory(tree(tmp_path, {"proc/meminfo": MEMINFO} | files)) == (total, usable)


def hybrid(root: Path) -> Path:
    """8 performance cores of two threads (0-15) and 8 others (16-23), as Intel's driver shows them."""
    files = {"sys/devices/cpu_core/cpus": "0-15\n"}
    for cpu in range(24):
        pair = f"{cpu & ~1}-{cpu | 1}" if cpu < 16 else str(cpu)
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{pair}\n"
    return tree(root, files)


def test_cores_of_a_hybrid_processor(tmp_path: Path) -> None:
    root = hybrid(tmp_path)
    assert machine.cores(root, set(range(24))) == (16, 8)
    assert machine.cores(root, {0, 1, 2, 16}) == (3, 2)
    assert machine.cores(root, {16, 17}) == (2, 2), "no performance core is allowed: the others are what there is"


def test_cores_of_different_capacity(tmp_path: Path) -> None:
    sizes = {0: 1024, 1: 1024, 2: 400, 3: 400, 4: 400, 5: 400}
    files = {f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity": f"{size}\n" for cpu, size in sizes.items()}
    assert machine.cores(tree(tmp_path, files), set(sizes)) == (6, 2)


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n"},
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/a\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_quota_of_processor_time_is_a_number_of_cores(tmp_path: Path, files: dict[str, str]) -> None:
    assert machine.cores(tree(hybrid(tmp_path), files), set(range(24))) == (4, 4)


def test_no_quota(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}
    assert machine.cores(tree(hybrid(tmp_path), files), set(range(24))) == (16, 8)


def test_caches_are_added_up(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for cpu in range(4):
        for index, (level, size, shared) in enumerate([(1, "32K", cpu), (3, "96M", "0-1" if cpu < 2 else "2-3")]):
            folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            files |= {f"{folder}/level": f"{level}\n", f"{folder}/size": f"{size}\n"}
            files[f"{folder}/shared_cpu_list"] = f"{shared}\n"
    assert bandwidth.cache_bytes(tree(tmp_path, files)) == 192 << 20
    assert bandwidth.cache_bytes(tmp_path / "nowhere") == 32 << 20


def test_a_cache_that_does_not_say_its_size(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu/cpu0/cache/index"
    known = {f"{folder}1/level": "2\n", f"{folder}1/size": "1024K\n", f"{folder}1/shared_cpu_list": "0\n"}
    root = tree(tmp_path, known | {f"{folder}2/level": "3\n", f"{folder}2/shared_cpu_list": "0-3\n"})
    assert bandwidth.cache_bytes(root) == 1 << 20


@pytest.mark.parametrize(
    ("description", "rate"),
    [
        ("NVIDIA GeForce RTX 3090", 936e9),
        ("NVIDIA GeForce RTX 3090 Ti", 1008e9),
        ("NVIDIA GeForce RTX 4060 Ti", 288e9),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 960e9),
        ("llvmpipe (LLVM 15.0.6, 256 bits)", None),
    ],
)
def test_cards_by_name(description: str, rate: float | None) -> None:
    assert bandwidth.of_card(description) == rate


def test_longer_names_come_first() -> None:
    names = list(bandwidth.CARDS)
    hidden = [(name, before) for i, name in enumerate(names) for before in names[:i] if before in name]
    assert not hidden, "the shorter name would answer for the longer one"


def test_paper() -> None:
    made = Machine.paper(vram=[24 << 30, 12 << 30], ram=64 << 30, n_core=6)
    assert [device.name for device in made.devices] == ["GPU0", "GPU1"]
    assert all(0 < device.free < device.total for device in made.devices)
    assert 0 < made.ram_usable < made.ram_total == 64 << 30
    assert made.n_core == made.n_fast_core == 6
    assert made.cards == {"GPU0": 24 << 30, "GPU1": 12 << 30}


def test_json_and_back() -> None:
    made = Machine.paper(vram=[24 << 30], ram=64 << 30)
    assert Machine.from_json(json.loads(json.dumps(made.to_json()))) == made
    card = replace(made.devices[0], pace=Pace(4e11, 3e13), takes_experts=False)
    measured = replace(made, devices=(card,), stored=Pace(2e10, 4e11), repacked=Pace(3e10, 2e11), was_busy=True)
    measured = replace(measured, attention_token=8e9, attention_prompt=6e10)
    assert Machine.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_what_was_kept_before_there_were_paces() -> None:
    made = Machine.paper(vram=[24 << 30], ram=64 << 30)
    saved = made.to_json()
    for name in ("stored", "repacked", "attention_token", "attention_prompt", "was_busy"):
        del saved[name]
    for name in ("pace", "takes_experts"):
        del saved["devices"][0][name]
    assert Machine.from_json(saved) == made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYMOE_ENGINE", str(engine.find().bin))
    monkeypatch.setenv("HYMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "measured"


@pytest.mark.engine
def test_this_machine(cache: Path) -> None:
    found = machine.probe()
    assert 1 <= found.n_fast_core <= found.n_core <= (os.cpu_count() or 1)
    assert 0 < found.ram_usable <= found.ram_total
    assert found.cards is None
    first = {file: file.read_bytes() for file in cache.iterdir()}
    assert machine.probe().bandwidth == found.bandwidth, "measured once"
    assert {file: file.read_bytes() for file in cache.iterdir()} == first
    assert 1e8 < found.bandwidth < 1e13
    assert found.stored
    for pace in filter(None, (found.stored, found.repacked)):
        assert 1e7 < pace.read < 1e13
        assert 1e9 < pace.ops < 1e16
    assert found.attention_token
    assert found.attention_prompt


class Engine:
    """Answers as hymoe-measure does, with the numbers of one measurement after the other."""

    def __init__(self, *speeds: float) -> None:
        self.speeds = list(speeds)

    def __call__(self, mode: str, *arguments: str) -> dict[str, Any]:
        assert mode == "speeds"
        speed = self.speeds.pop(0)
        host = {"stored": {"read": speed, "ops": 9 * speed}, "repacked": None}
        cards = [
            {**CARD, "pace": {"read": 8.0, "ops": 80.0}, "link": speed, "link_pageable": 1.0},
            {**WORKER, "link": 2.0},
        ]
        return {"devices": cards, "bandwidth": speed + 1, "host": host}


CARD = {"name": "CUDA0", "description": "NVIDIA GeForce RTX 3090", "kind": "gpu", "total": 24 << 30, "free": 20 << 30}
WORKER = {"name": "RPC0", "description": "worker:50052", "kind": "rpc", "total": 1 << 30, "free": 1 << 30}


@pytest.mark.engine
def test_what_was_measured_beside_other_work_does_not_stay(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured again when nothing else runs, but not before; of every number the better one is kept."""
    asked = Engine(5.0, 7.0, 6.0, 4.0)
    monkeypatch.setattr(measuring, "ask", asked)
    now = {"busy": True, "quiet": False}
    monkeypatch.setattr(quiet.Watch, "busy", lambda self: now["busy"])
    monkeypatch.setattr(quiet, "is_quiet", lambda: now["quiet"])

    def read(*, fresh: bool = False) -> tuple[float, bool]:
        found = bandwidth.measured(2, 8 << 30, [CARD, WORKER], ["worker:50052"], fresh=fresh)
        assert found["host"]["stored"]["ops"] == 9 * found["host"]["stored"]["read"] == 9 * (found["ram"] - 1)
        assert found["devices"]["CUDA0"] == {
            "pace": {"read": 8.0, "ops": 80.0},
            "link": found["host"]["stored"]["read"],
            "link_pageable": 1.0,
        }
        assert found["devices"]["RPC0"] == {"link": 2.0}
        return found["host"]["stored"]["read"], found["busy"]

    assert [read(), read()] == [(5.0, True)] * 2
    now["quiet"] = True  # and still something began while it was measured
    assert read() == (7.0, True)
    now["busy"] = False
    assert [read(), read()] == [(7.0, False)] * 2
    assert asked.speeds == [4.0]
    assert read(fresh=True) == (4.0, False), "what is asked for while nothing else runs is believed"
    now["busy"] = True
    asked.speeds = [3.0]
    assert read(fresh=True) == (4.0, False)


@pytest.mark.engine
def test_overrides_take_the_place_of_what_is_found(cache: Path) -> None:
    found = machine.probe(ram=48 << 30, threads=3)
    assert (found.ram_usable, found.n_core, found.n_fast_core) == (48 << 30, 3, 3)
    assert found.ram_total >= 48 << 30


@pytest.mark.engine
def test_a_worker_is_a_device(cache: Path) -> None:
    with rpc_worker() as address:
        found = machine.probe(rpc=[address])
    worker = next(device for device in found.devices if device.kind == "rpc")
    assert (worker.name, worker.description) == ("RPC0", address)
    assert worker.total >= worker.free > 0
    assert worker.link
    assert worker.bandwidth is None


@pytest.mark.engine
def test_a_worker_that_is_not_there(cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"RPC worker {address} does not answer"):
            machine.probe(rpc=[address])


@pytest.mark.engine
def test_vulkan_is_listed_with_its_memory(cache: Path) -> None:
    listed = [Device(**found, bandwidth=None, link=None) for found in measuring.ask("devices")["devices"]]
    if not listed:
        pytest.skip("no device, or an engine without a backend for it")
    for device in listed:
        assert device.kind in {"gpu", "igpu"}
        assert 0 < device.free <= device.total
