"""Where built engines live, and which one this checkout runs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from hymoe.engine import patches, pin
from hymoe.errors import EngineError

ENGINE_VARIABLE: Final = "HYMOE_ENGINE"
CACHE_VARIABLE: Final = "HYMOE_CACHE"
MANIFEST: Final = "manifest.json"
BUILD_IT: Final = "run `hy-engine build`"
BUILD_STOCK: Final = "run `hy-engine build --stock`"
# Variables for every process that computes. GNU's OpenMP lets a thread spin 300,000 times, some milliseconds, for one
# that another program keeps from running, at every one of a token's hundreds of barriers. A tenth of it is more than
# twice as fast where every processor is busy, and costs nothing where nothing else runs (docs/log.md).
WAITING: Final = {"GOMP_SPINCOUNT": "30000"}
# The engine's tools read their options from these as well; what runs must be what the command line says.
IGNORED_VARIABLES: Final = ("LLAMA_ARG_", "AIP_")


@dataclass(frozen=True)
class Engine:
    """A built engine.

    bin: the one folder that holds its executables and shared libraries.
    manifest: what it was built from; empty for a folder that HYMOE_ENGINE names.
    """

    bin: Path
    manifest: dict[str, Any]

    def tool(self, name: str) -> Path:
        """Give the path of an executable such as `llama-server`. Raises EngineError where it is missing."""
        file = self.bin / name
        if not file.is_file() or not os.access(file, os.X_OK):
            raise EngineError(f"the engine in {self.bin} has no {name}", fix="run `hy-engine build --force`")
        return file

    def library(self, name: str) -> Path:
        """Give the path of a shared library such as `ggml-base`. Raises EngineError where it is missing."""
        for suffix in (".so", ".dylib"):
            if (file := self.bin / f"lib{name}{suffix}").is_file():
                return file
        raise EngineError(f"the engine in {self.bin} has no library {name}", fix="run `hy-engine build --force`")


def environment() -> dict[str, str]:
    """Give the environment for a tool of the engine: ours without IGNORED_VARIABLES, and WAITING where we have none."""
    return WAITING | {name: value for name, value in os.environ.items() if not name.startswith(IGNORED_VARIABLES)}


def engine_root() -> Path:
    """Folder of everything the engine room keeps between runs (HYMOE_CACHE moves it)."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute() / "engine"
    import platformdirs

    return Path(platformdirs.user_cache_dir("hymoe", appauthor=False)) / "engine"


def source_digest(*, stock: bool = False) -> str:
    """Hash of the source an engine of this checkout is built from: the pinned sdist and our changes to it."""
    return hashlib.sha256(f"{pin.SHA256} {patches.digest(stock=stock)}".encode()).hexdigest()


@cache
def host() -> str:
    """Name the processor well enough to tell whether code built for it runs here."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        flags = next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return f"{platform.system()}-{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def manifest_of(entry: Path) -> dict[str, Any] | None:
    """Read what `entry` was built from; None where it is no finished build."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and (entry / "bin").is_dir() else None


def find(*, stock: bool = False) -> Engine:
    """Give the engine that HYMOE_ENGINE names, else the one `hy-engine build` chose last for this source and processor.

    stock: the unchanged peer of tests and benchmarks instead (`hy-engine build --stock`).
    Raises EngineError with the remedy where there is none.
    """
    if (given := os.environ.get(ENGINE_VARIABLE)) and not stock:
        folder = Path(given).expanduser().absolute()
        if not folder.is_dir():
            raise EngineError(
                ENGINE_VARIABLE, got=f"{given}, which is no folder", expected="one with llama-server and its libraries"
            )
        return Engine(folder, {})
    wanted = {"source": source_digest(stock=stock), "host": host()}
    built = [(entry, found) for entry in _entries() if (found := manifest_of(entry))]
    fitting = [
        (entry, found) for entry, found in built if all(found.get(key) == value for key, value in wanted.items())
    ]
    if not fitting:
        why = "builds of other sources or processors only" if built else "nothing is built yet"
        raise EngineError(f"no engine in {engine_root()}: {why}", fix=BUILD_STOCK if stock else BUILD_IT)
    entry, manifest = max(fitting, key=lambda pair: (pair[0] / MANIFEST).stat().st_mtime_ns)
    return Engine(entry / "bin", manifest)


def _entries() -> list[Path]:
    try:
        return sorted(entry for entry in engine_root().iterdir() if "." not in entry.name)
    except OSError:
        return []
