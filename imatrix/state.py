"""Measurements that take minutes, kept in the cache by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from hymoe import console


class State:
    """A measurement in the cache, by what it depends on."""

    def __init__(self, key: Sequence[object]) -> None:
        from hymoe.engine.installed import engine_root

        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        self.path = engine_root().parent / "recipes" / f"{digest[:32]}.json"

    def get(self, measure: Callable[[], Any]) -> Any:
        """Read it, or measure and keep it."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
        found = measure()
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(found), encoding="utf-8")
            part.replace(self.path)
        except OSError as exc:
            console.warn(f"{self.path}: not kept for the next time ({exc.strerror})")
        return found
