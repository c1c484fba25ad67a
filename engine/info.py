"""What the engine in use is made of, as `hy-engine info` shows it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any, Final

from hymoe.engine.installed import ENGINE_VARIABLE, find
from hymoe.errors import EngineError

if TYPE_CHECKING:
    from hymoe.engine.installed import Engine

LABEL_WIDTH: Final = 17


def describe() -> str:
    """Describe the engine that `find` gives, a `label: value` line each. Raises EngineError where there is none."""
    engine = find()
    rows = (
        _made_of(engine.manifest) if engine.manifest else [("source", f"unknown: {ENGINE_VARIABLE} names the folder")]
    )
    rows += [("devices", device) for device in devices(engine)]
    rows += [("folder", str(engine.bin))]
    return "\n".join(f"{label + ':':<{LABEL_WIDTH}} {value}" for label, value in rows)


def devices(engine: Engine) -> list[str]:
    """List what the engine can put layers on besides the processor, in its own words."""
    done = subprocess.run([engine.tool("llama-server"), "--list-devices"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError("the engine does not list its devices", got=f"exit status {done.returncode}")
    lines = done.stdout.partition("Available devices:")[2].splitlines()
    return [line.strip() for line in lines if line.strip() not in ("", "(none)")] or ["processor only"]


def _made_of(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    sdist, llama = manifest["sdist"], manifest["llama.cpp"]
    return [
        ("source", f"{sdist['package']} {sdist['version']}, sha256 {sdist['sha256']}"),
        ("llama.cpp", f"{llama['version']} ({llama['commit']})"),
        *[("our file", name) for name in manifest["new_files"]],
        *[("patch", f"{name}: {why}") for name, why in manifest["patches"].items()],
        ("backend", manifest["backend"]),
        ("compiler", f"{manifest['compiler']['version']} ({manifest['compiler']['path']})"),
        ("instruction set", " ".join(manifest["instruction_set"]["names"])),
        ("built", f"{manifest['built']} in {manifest['build_seconds']} s"),
        ("key", manifest["key"]),
    ]
