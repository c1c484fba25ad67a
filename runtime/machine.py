"""What a machine has for running a model: devices with their free memory, RAM, cores, and how fast memory is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any, Final, Self

from hymoe.runtime import bandwidth, measuring, workers
from hymoe.runtime.bandwidth import Pace
from hymoe.sizes import DESKTOP_VRAM, SYSTEM_RAM

ROOT: Final = Path("/")
# Of a machine on paper: what dual-channel DDR5-5600 (89.6 GB/s) gives to threads that add it up, and a usual card.
PAPER_RAM_BANDWIDTH: Final = 60e9
PAPER_VRAM_BANDWIDTH: Final = bandwidth.CARDS["RTX 3090"]
PAPER_LINK: Final = bandwidth.PCIE4
PAPER_CORES: Final = 8


@dataclass(frozen=True)
class Device:
    """A card, or a worker on the network, as the engine lists it ("CUDA0", "Vulkan0", "RPC0").

    kind: "gpu", "igpu" (it shares the RAM) or "rpc". total, free: bytes. bandwidth: bytes/s of its own memory by its
    maker, None where unknown. link: bytes/s from RAM to it, out of memory that it can read by itself; link_pageable:
    out of any. pace: None where it was not measured. takes_experts: whether it has a kernel for them.
    """

    name: str
    description: str
    kind: str
    total: int
    free: int
    bandwidth: float | None
    link: float | None
    link_pageable: float | None = None
    pace: Pace | None = None
    takes_experts: bool = True

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Make what `asdict` gave, or gave before there were paces."""
        return cls(**{**saved, "pace": Pace.of(saved.get("pace"))})


@dataclass(frozen=True)
class Machine:
    """Devices in the engine's order; bytes of RAM, all and usable now; cores; bytes/s at which all cores read RAM.

    n_core: physical cores that this process may use; n_fast_core: those of them that are performance cores.
    is_paper: nothing of it need be here; buffers are measured on cards that stand for its own. stored, repacked: paces
    of the cores with weights as they are in the file, and in the layout that the engine may give them; attention_token,
    attention_prompt: operations/s of the cores in attention; None where they were not measured. was_busy: other
    programs ran while they were.
    """

    devices: tuple[Device, ...]
    ram_total: int
    ram_usable: int
    n_core: int
    n_fast_core: int
    bandwidth: float
    is_paper: bool = False
    stored: Pace | None = None
    repacked: Pace | None = None
    attention_token: float | None = None
    attention_prompt: float | None = None
    was_busy: bool = False

    def to_json(self) -> dict[str, Any]:
        """Give what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Make what `to_json` gave."""
        paces = {name: Pace.of(saved.get(name)) for name in ("stored", "repacked")}
        return cls(**{**saved, **paces, "devices": tuple(map(Device.from_json, saved["devices"]))})

    @classmethod
    def paper(
        cls,
        *,
        vram: Sequence[float],
        ram: float,
        ram_bandwidth: float = PAPER_RAM_BANDWIDTH,
        vram_bandwidth: float = PAPER_VRAM_BANDWIDTH,
        link: float = PAPER_LINK,
        n_core: int = PAPER_CORES,
    ) -> Self:
        """Describe a machine by the bytes of its cards and its RAM; system and desktop keep their share of both."""
        cards = tuple(
            Device(
                name=f"GPU{index}",
                description=f"a card of {size / 2**30:.0f} GiB",
                kind="gpu",
                total=int(size),
                free=max(int(size) - DESKTOP_VRAM, 0),
                bandwidth=vram_bandwidth,
                link=link,
                link_pageable=link * bandwidth.PAGEABLE_SHARE,
            )
            for index, size in enumerate(vram)
        )
        return cls(cards, int(ram), max(int(ram) - SYSTEM_RAM, 0), n_core, n_core, ram_bandwidth, is_paper=True)

    @property
    def cards(self) -> Mapping[str, int] | None:
        """What `buffers.measure` takes as `cards`: the devices of a machine on paper; None where they are here."""
        return {device.name: device.total for device in self.devices} if self.is_paper else None


def probe(
    *,
    ram: int | None = None,
    threads: int | None = None,
    rpc: Sequence[str] = (),
    fresh: bool = False,
) -> Machine:
    """Look at this machine. ram (bytes) and threads take the place of what is found.

    rpc: workers as host:port. Speeds are measured the first time, a second or so, and remembered; `fresh`: measured
    again. Raises EngineError where no engine is built, WorkerError for a worker that does not answer.
    """
    total, usable = memory()
    n_core, n_fast_core = cores()
    workers.check(rpc)
    listed = measuring.ask("devices", *(("--rpc", ",".join(rpc)) if rpc else ()))["devices"]
    speeds = bandwidth.measured(threads or n_core, usable, listed, rpc, fresh=fresh)
    devices = tuple(_device(found, speeds["devices"].get(found["name"], {})) for found in listed)
    return Machine(
        devices=devices,
        ram_total=total if ram is None else max(total, ram),
        ram_usable=usable if ram is None else ram,
        n_core=threads or n_core,
        n_fast_core=threads or n_fast_core,
        bandwidth=speeds["ram"],
        stored=Pace.of(speeds["host"].get("stored")),
        repacked=Pace.of(speeds["host"].get("repacked")),
        attention_token=speeds["host"].get("attention_token"),
        attention_prompt=speeds["host"].get("attention_prompt"),
        was_busy=speeds["busy"],
    )


def _device(found: Mapping[str, Any], speeds: Mapping[str, Any]) -> Device:
    is_near = found["kind"] != "rpc"
    link = speeds.get("link", bandwidth.PCIE4 if is_near else None)
    slow = link * bandwidth.PAGEABLE_SHARE if link and is_near else link
    return Device(
        **found,
        bandwidth=bandwidth.of_card(found["description"]),
        link=link,
        link_pageable=speeds.get("link_pageable", slow),
        pace=Pace.of(speeds.get("pace")),
    )


def stream_device(devices: Sequence[Device]) -> Device | None:
    """Give the device that experts in RAM are sent to for prompts: the first that computes them and is no worker."""
    return next((device for device in devices if device.kind != "rpc" and device.takes_experts), None)


def repacks(devices: Sequence[Device]) -> bool:
    """Whether the engine may repack weights in RAM: beside a GPU they lie in memory that it reads by itself."""
    return all(device.kind == "rpc" for device in devices)


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(root: Path = ROOT) -> tuple[int, int]:
    """Give the bytes of RAM that this process could ever have and those it can have now, by its cgroups' limits too."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux: nothing says what is in use
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total * 3 // 4
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total, usable = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    for limit, used in _limits(root):
        total, usable = min(total, limit), min(usable, max(limit - used, 0))
    return total, usable


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Give limit and use in bytes of every cgroup that this process is in; files in memory that can go are not used."""
    for folder in _groups(root, "memory"):
        for limit_file, used_file, prefix in (
            ("memory.max", "memory.current", ""),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
        ):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is None or used is None:
                continue
            stat = _table(folder / "memory.stat")
            yield limit, used - sum(stat.get(f"{prefix}{name}_file", 0) for name in ("active", "inactive"))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Give the folders of the process's cgroups with a controller, of each hierarchy from the inside out."""
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Inside a container the path is often one of the host's; what is mounted is then the group itself.
        top = mounts / controller if controllers else mounts
        inner = top / path.strip("/")
        chain = [inner, *inner.parents] if inner.is_dir() else [top]
        yield from (folder for folder in chain if folder == top or top in folder.parents)


def _number(file: Path) -> int | None:
    """Read a file that holds one number; None where there is none, or "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _table(file: Path) -> dict[str, int]:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdecimal()}


# -- cores -------------------------------------------------------------------------------------------------------------


def cores(root: Path = ROOT, allowed: set[int] | None = None) -> tuple[int, int]:
    """Give the number of physical cores that this process may use, and of performance cores among them.

    allowed: logical processors; None: those of this process. A cgroup's quota of processor time counts as cores.
    """
    if allowed is None:
        allowed = _affinity()
    folder = root / "sys/devices/system/cpu"
    siblings = {(folder / f"cpu{cpu}/topology/thread_siblings_list"): cpu for cpu in sorted(allowed)}
    first: dict[str, int] = {}  # one processor of each core
    for file, cpu in siblings.items():
        first.setdefault(_text(file) or str(cpu), cpu)
    fast = _fast(root, set(first.values()))
    quota = _quota(root)
    return max(1, ceil(min(len(first), quota))), max(1, ceil(min(len(fast), quota)))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _fast(root: Path, cpus: set[int]) -> set[int]:
    """Pick the performance cores: Intel's kernel driver names them, Arm's gives every core a capacity."""
    named = _text(root / "sys/devices/cpu_core/cpus")
    if named:
        return cpus & set(_ranges(named)) or cpus
    capacity = {cpu: _number(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") or 0 for cpu in cpus}
    most = max(capacity.values(), default=0)
    return {cpu for cpu, found in capacity.items() if found == most}


def _ranges(text: str) -> Iterator[int]:
    """Read a kernel's list of processors, "0-7,16"."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _quota(root: Path) -> float:
    """Give the processor time that the process's cgroups allow, in cores."""
    least = inf
    for folder in _groups(root, "cpu"):
        words = (_text(folder / "cpu.max") or "").split()  # version 2: "quota period", in microseconds
        if not words:
            words = [_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if words[0].isdecimal() and words[1].isdecimal():
            least = min(least, int(words[0]) / int(words[1]))
    return least


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return None
