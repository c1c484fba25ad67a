"""How fast a machine is: measured where it is here, from the makers' data sheets where it is not."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from hymoe.runtime import measuring, quiet

# Bytes per second, by what a device's description contains; the first that is found counts, so longer names come
# first. Sources: the makers' specifications (nvidia.com, amd.com, intel.com), memory bandwidth of the reference card.
CARDS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "H200": 4800e9,
        "H100": 3350e9,
        "A100": 2039e9,
        "L40S": 864e9,
        "RTX 6000 Ada": 960e9,
        "RTX A6000": 768e9,
        "RTX A5000": 768e9,
        "RTX 5090": 1792e9,
        "RTX 5080": 960e9,
        "RTX 5070 Ti": 896e9,
        "RTX 5070": 672e9,
        "RTX 5060 Ti": 448e9,
        "RTX 4090": 1008e9,
        "RTX 4080 SUPER": 736e9,
        "RTX 4080": 717e9,
        "RTX 4070 Ti SUPER": 672e9,
        "RTX 4070": 504e9,
        "RTX 4060 Ti": 288e9,
        "RTX 4060": 272e9,
        "RTX 3090 Ti": 1008e9,
        "RTX 3090": 936e9,
        "RTX 3080 Ti": 912e9,
        "RTX 3080": 760e9,
        "RTX 3070": 448e9,
        "RTX 3060": 360e9,
        "RTX 2080 Ti": 616e9,
        "P40": 347e9,
        "RX 9070": 640e9,
        "RX 7900 XTX": 960e9,
        "RX 7900 XT": 800e9,
        "RX 7800 XT": 624e9,
        "RX 6900 XT": 512e9,
        "RX 6800": 512e9,
        "Arc A770": 560e9,
        "Arc B580": 456e9,
    }
)
# PCIe 4.0 x16 carries 31.5 GB/s; what arrives of copies out of pinned memory is about three quarters of that.
PCIE4: Final = 24e9
# Copies out of memory that the card cannot read by itself go through a buffer of the driver's.
PAGEABLE_SHARE: Final = 0.5

SECONDS: Final = 0.2  # for each number
PACE_TYPE: Final = "Q4_K"
_LEAST, _MOST = 256 << 20, 2 << 30


@dataclass(frozen=True)
class Pace:
    """What a processor does with a mixture's weights: bytes/s of them read for one token; operations/s for a prompt.

    Of a machine it is measured on weights of PACE_TYPE. A weight times an activation is two operations.
    """

    read: float
    ops: float

    @classmethod
    def of(cls, found: Mapping[str, float] | None) -> Self | None:
        """Make it of JSON; None where a number is missing."""
        return cls(found["read"], found["ops"]) if found and found.keys() >= {"read", "ops"} else None

    def mixed(self, other: Pace, share: float) -> Pace:
        """Give the pace where `share` of the weights are worked on at another one."""
        read, ops = (1 / ((1 - share) / getattr(self, name) + share / getattr(other, name)) for name in ("read", "ops"))
        return Pace(read, ops)


def of_card(description: str) -> float | None:
    """Give the bytes per second of a card's memory by its name, None for one that is not in the table."""
    lower = description.lower()
    return next((rate for name, rate in CARDS.items() if name.lower() in lower), None)


def measured(
    n_core: int, ram_usable: int, devices: Sequence[Mapping[str, Any]], rpc: Sequence[str], *, fresh: bool = False
) -> dict[str, Any]:
    """Give "ram" (bytes/s), "host" (paces of "stored" and "repacked" weights, operations/s in "attention_token" and
    "attention_prompt"), "devices" by name ("pace", "link" and "link_pageable" in bytes/s, where known), and "busy":
    whether other programs had a part of the machine.

    Measured once for a processor, its cores and these devices, about a second and one more for each device; again for
    `fresh`, and after a busy time as soon as the machine is quiet.
    """
    known = [[device[name] for name in ("name", "description", "total")] for device in devices]
    key = {"cpu": cpu_name(), "cores": n_core, "devices": known, "rpc": list(rpc)}
    kept = measuring.recall("speeds", key)
    if kept is not None and not fresh and not (kept["busy"] and quiet.is_quiet()):
        return kept
    size = min(max(4 * cache_bytes(), _LEAST), _MOST, ram_usable // 4)
    found = _measure(size, ["-t", str(n_core), *(("--rpc", ",".join(rpc)) if rpc else ())])
    if kept is not None and (found["busy"] or not fresh):
        found = {**_better(kept, found), "busy": kept["busy"] and found["busy"]}
    return measuring.keep("speeds", key, found)


def _measure(n_bytes: int, arguments: Sequence[str]) -> dict[str, Any]:
    watch = quiet.Watch()
    answer = measuring.ask("speeds", str(n_bytes), str(SECONDS), *arguments)
    kinds = ("pace", "link", "link_pageable")
    devices = {device["name"]: {kind: device[kind] for kind in kinds if kind in device} for device in answer["devices"]}
    return {"ram": answer["bandwidth"], "host": answer["host"], "devices": devices, "busy": watch.busy()}


def _better(old: Any, new: Any) -> Any:
    """Give the larger of every number: other work on a machine only ever makes it slower."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {name: _better(old.get(name), new.get(name)) for name in old | new}
    return max((value for value in (old, new) if value is not None), default=None)


def cpu_name(root: Path = Path("/")) -> str:
    """Name the processor."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cache_bytes(root: Path = Path("/")) -> int:
    """Give the bytes of all caches of the last level together; 32 MiB where the system does not say."""
    sizes: dict[tuple[int, str], int] = {}  # by level and the processors that share it
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size, shared = (
                (folder / name).read_text(encoding="ascii").strip() for name in ("level", "size", "shared_cpu_list")
            )
        except OSError:  # firmware of many Arm boards does not say a cache's size
            continue
        sizes[int(level), shared] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1:], 0)
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or 32 << 20
