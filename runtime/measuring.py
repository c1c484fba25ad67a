"""Asking the engine about the machine and about models, and remembering what took time to find out.

The engine's tool `hymoe-measure` answers: it sees devices, buffers and graphs as llama-server will.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from hymoe.errors import EngineError

TOOL: Final = "hymoe-measure"
FORMAT: Final = 1  # of what is remembered; another number and everything is asked again
# Whatever a machine is busy with; loading a head takes the tool half a second.
SECONDS: Final = 300
MIN_BATCH_VARIABLE: Final = "GGML_OP_OFFLOAD_MIN_BATCH"
# What the tool's log says went wrong, what says most first.
_REASONS: Final = (
    re.compile(r"error loading model: (.*\S)"),
    re.compile(r"error while handling (argument .*\S)"),
    re.compile(r"^[\d.]+ E (?:\w+: )?(.*\S)", re.MULTILINE),
    re.compile(r"^error: (.*\S)", re.MULTILINE),
)


def ask(*arguments: str, min_batch: int | None = None) -> dict[str, Any]:
    """Run `hymoe-measure` and give its answer.

    min_batch: tokens from which devices take work on weights in RAM; None: the engine's own.
    Raises EngineError where the tool is missing or refuses, with its reason.
    """
    from hymoe import engine

    tool = engine.find().tool(TOOL)
    variables = engine.environment() | ({} if min_batch is None else {MIN_BATCH_VARIABLE: str(min_batch)})
    try:
        done = subprocess.run(
            [tool, *arguments],
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as exc:
        raise EngineError("the engine does not answer", got=f"nothing in {SECONDS} s from {TOOL}") from exc
    if done.returncode:
        raise EngineError("the engine cannot measure this", got=reason(done.stderr, done.returncode))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def reason(log: str, returncode: int) -> str:
    """Pick from the tool's log why it failed, in its own words."""
    if said := next((found for pattern in _REASONS if (found := pattern.search(log))), None):
        return said[1]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {returncode}"


def remembered(kind: str, key: object, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Give what was found out about `key` before, else find it out and keep it.

    key: anything that JSON can hold. The engine in use is always part of it.
    """
    kept = recall(kind, key)
    return keep(kind, key, find()) if kept is None else kept


def recall(kind: str, key: object) -> dict[str, Any] | None:
    """Give what was found out about `key` before; None where that is nothing."""
    try:
        found = json.loads(_file(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def keep(kind: str, key: object, found: dict[str, Any]) -> dict[str, Any]:
    """Keep what was found out about `key` in the cache folder, in place of what was there; gives it back."""
    with suppress(OSError):  # a cache that cannot be written costs time, no more
        _write(_file(kind, key), found)
    return found


def folder() -> Path:
    """Give the cache's folder of what was measured."""
    from hymoe.engine.installed import engine_root

    return engine_root().parent / "measured"


def _file(kind: str, key: object) -> Path:
    asked = json.dumps([FORMAT, _engine(), key], sort_keys=True)
    return folder() / f"{kind}-{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"


def _engine() -> str:
    from hymoe import engine

    found = engine.find()
    return str(found.manifest.get("key") or found.bin)


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False, encoding="utf-8") as part:
        json.dump(content, part)
    Path(part.name).replace(file)
