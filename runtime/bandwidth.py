"""How fast memories are read: measured where they are here, from the makers' data sheets where they are not."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from hymoe.runtime import measuring

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

SECONDS: Final = 0.3  # for each memory and link
_LEAST, _MOST = 256 << 20, 4 << 30


def of_card(description: str) -> float | None:
    """Give the bytes per second of a card's memory by its name, None for one that is not in the table."""
    lower = description.lower()
    return next((rate for name, rate in CARDS.items() if name.lower() in lower), None)


def measured(
    n_core: int, ram_usable: int, devices: Sequence[Mapping[str, Any]], rpc: Sequence[str], *, fresh: bool = False
) -> dict[str, Any]:
    """Give bytes per second: "ram", and under "devices" by name "bandwidth", "link", "link_pageable" where known.

    Measured once for a processor, its cores and these devices, about a second and one more for each device; `fresh`:
    again.
    """
    known = [[device[name] for name in ("name", "description", "total")] for device in devices]
    key = {"cpu": cpu_name(), "cores": n_core, "devices": known, "rpc": list(rpc)}
    size = min(max(4 * cache_bytes(), _LEAST), _MOST, ram_usable // 4)

    def ask() -> dict[str, Any]:
        arguments = ["-t", str(n_core), *(("--rpc", ",".join(rpc)) if rpc else ())]
        answer = measuring.ask("speeds", str(size), str(SECONDS), *arguments)
        speeds = {d["name"]: {k: v for k, v in d.items() if k.startswith(("band", "link"))} for d in answer["devices"]}
        return {"ram": answer["bandwidth"], "devices": speeds}

    return measuring.keep("bandwidth", key, ask()) if fresh else measuring.remembered("bandwidth", key, ask)


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
