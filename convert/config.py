"""Typed reads of a checkpoint's JSON files: no silent defaults for anything that changes shapes or logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hymoe.errors import CheckpointError, UnsupportedError

MAX_JSON_BYTES = 256 << 20

# What GGUF's 32-bit metadata can hold.
MAX_INTEGER = 2**31 - 1
MIN_NUMBER, MAX_NUMBER = 2.0**-126, (2 - 2**-23) * 2.0**127


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for anything else, whatever is wrong with the file."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path.name}: size", got=f"{size} bytes", expected=f"at most {limit}")
        value = parse_json(path.read_bytes())
    except OSError as exc:
        raise CheckpointError(f"{path}: {exc.strerror}", fix="download the file again") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path.name}: not valid JSON ({exc})", fix="download the file again") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}", got=f"a JSON {type(value).__name__}", expected="a JSON object")
    return value


def parse_json(raw: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read JSON text, `pairs` as json.loads' object_pairs_hook. Raises ValueError or RecursionError.

    Half of a surrogate pair is refused: it is no text, and nothing could write it again.
    """
    value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=pairs)
    if b"\\u" in raw:
        json.dumps(value, ensure_ascii=False).encode()
    return value


class Config:
    """One JSON object whose keys are read with a type, by name, or refused by name."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = data
        self.source = source

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read `path` as a JSON object."""
        return cls(read_json(path), path.name)

    def has(self, key: str) -> bool:
        """Say whether the key is there and not null."""
        return self.data.get(key) is not None

    def sub(self, *keys: str) -> Config:
        """Give the first of the nested objects `keys` that exists, an empty one where none does."""
        for key in keys:
            if self.has(key):
                value = self.data[key]
                if not isinstance(value, dict):
                    raise self._wrong(key, value, "a JSON object")
                return Config(value, f"{self.source}: {key}")
        return Config({}, self.source)

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        """Read an int from `minimum` to 2^31 - 1 under the first of `keys` that exists."""
        key, value = self._find(keys, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self._wrong(key, value, f"an integer of at least {minimum}")
        if value > MAX_INTEGER:
            raise self._wrong(key, value, f"an integer of at most {MAX_INTEGER}")
        return value

    def number(self, *keys: str, default: float | None = None, zero: bool = False) -> float:
        """Read a positive number that float32 can hold (or 0, where `zero`) under the first of `keys` that exists."""
        key, value = self._find(keys, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not (MIN_NUMBER <= value <= MAX_NUMBER or (zero and value == 0))
        ):
            kind = "number of at least 0" if zero else "positive number"
            raise self._wrong(key, value, f"a {kind} that a 32-bit float can hold")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """Read a bool."""
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def uniform(self, *keys: str, n_layer: int, default: int | None = None) -> int:
        """Read an int, or a list of n_layer equal ints: the graph has one value for all layers."""
        key, value = self._find(keys, default)
        if not isinstance(value, list):
            return self.integer(key, default=default)
        if len(value) != n_layer:
            raise self._wrong(key, f"{len(value)} values", f"{n_layer}, one per layer")
        first = Config({key: value[0]}, self.source).integer(key)
        for il, item in enumerate(value):
            if item != first:
                raise UnsupportedError(
                    f"{self.source}: {key}",
                    got=f"{item!r} for layer {il} and {first} for layer 0",
                    expected="one value",
                )
        return first

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse the checkpoint where `key` is present with a value that is not implemented."""
        value = self.data.get(key)
        if value is None or any(
            value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed
        ):
            return
        wanted = " or ".join(json.dumps(item) for item in allowed)
        raise UnsupportedError(
            f"{self.source}: {key}", got=_short(value), expected=f"{wanted} (others are not implemented)"
        )

    def _find(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for key in keys:
            if self.has(key):
                return key, self.data[key]
        if default is None:
            raise CheckpointError(f"{self.source}: {' or '.join(keys)}", got="nothing", expected="a value")
        return keys[0], default

    def _wrong(self, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key}", got=_short(value), expected=expected)


def _short(value: object, limit: int = 60) -> str:
    text = value if isinstance(value, str) and not _reads_as_json(value) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _reads_as_json(text: str) -> bool:
    """Whether a string without its quotes would look like another value: "4" is no number, and "" is not nothing."""
    try:
        json.loads(text.lower() or "0")
    except (ValueError, RecursionError):
        return False
    return True
