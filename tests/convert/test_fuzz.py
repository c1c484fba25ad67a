"""Mutated headers, indices, configs and vocabularies: a file or one clear line, never a traceback, never a hang."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from convert import quantized
from hymoe.convert import miniature
from hymoe.convert.cli import main
from hymoe.convert.miniature import Spec

SPEC = Spec(n_layer=1, n_embd=64, n_head=2, n_head_kv=1, head_dim=32, n_ff=32, n_expert=2, n_expert_used=2, n_rank=260)
SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"
SECONDS = 20.0

WRITERS: dict[str, Callable[[Path], Path]] = {
    "plain": lambda folder: miniature.write(folder / "in", SPEC),
    "sharded": lambda folder: miniature.write(folder / "in", replace(SPEC, max_shard_bytes=20_000)),
    "transformers 5": lambda folder: miniature.write(folder / "in", replace(SPEC, config_style="transformers5")),
    "fp8": lambda folder: quantized.write(folder, quantized.Fp8(compressed=True), SPEC),
    "gptq": lambda folder: quantized.write(folder, quantized.Gptq(group_size=16), SPEC),
    "awq": lambda folder: quantized.write(folder, quantized.Awq(group_size=16), SPEC),
}
# What to mutate of which checkpoint, and how many times of every hundred.
TARGETS: dict[tuple[str, str], int] = {
    ("plain", "config.json"): 16,
    ("plain", "generation_config.json"): 6,
    ("plain", "tokenizer_config.json"): 6,
    ("plain", "hy.tiktoken"): 8,
    ("plain", SHARD): 14,
    ("sharded", INDEX): 8,
    ("sharded", "model-00001-of-*.safetensors"): 4,
    ("transformers 5", "config.json"): 4,
    ("transformers 5", "tokenizer.json"): 10,
    ("transformers 5", "chat_template.jinja"): 2,
    ("fp8", "config.json"): 4,
    ("fp8", SHARD): 4,
    ("gptq", "config.json"): 4,
    ("gptq", SHARD): 4,
    ("awq", "config.json"): 3,
    ("awq", SHARD): 3,
}
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**40),
    *(0.0, -0.0, 0.5, 1e-45, 1e38, 1e39, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "x", "0", "1", "\0", "\n", "\ud800", "é\u0301", "\U0010ffff", "../x", "/", "a" * 5000, "{{", "{%"),
    *([], [[]], {}, [None], [0], [-1], [1, 1], ["x"], {"": {}}, {"type": "dynamic"}, [[[[[[]]]]]]),
)


# -- mutations -------------------------------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def odd_value(rng: random.Random) -> Any:
    """A copy, since later mutations may change its inside."""
    return deepcopy(rng.choice(ODD_VALUES))


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Change one place: another value, a neighbouring number, another's value, gone, renamed, wrapped."""
    found = list(places(value))
    if not found:
        return odd_value(rng)
    container, key = rng.choice(found)
    old = container[key]
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(old, int | float):
            container[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, str(old), float(old)))
        case 2:
            other, other_key = rng.choice(found)
            container[key] = deepcopy(other[other_key]) if other_key in keys(other) else old
        case 3 if isinstance(container, dict):
            container[rng.choice((key + "x", key[:-1], "", "__metadata__"))] = container.pop(key)
        case 4:
            container[key] = [old] if rng.random() < 0.5 else {"x": old}
        case 5 if isinstance(old, list):
            container[key] = old[: rng.randrange(len(old) + 1)] + old[: rng.randrange(2)]
        case _:
            container[key] = odd_value(rng)
    return value


def keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Flip, cut, repeat, insert or drop some bytes."""
    begin = rng.randrange(len(raw) + 1)
    end = min(len(raw), begin + rng.choice((1, 2, 8, 100, 5000)))
    noise = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 9))))
    return rng.choice(
        (
            raw[:begin] + noise + raw[end:],
            raw[:begin] + noise + raw[begin:],
            raw[:begin] + raw[end:],
            raw[:begin] + raw[begin:end] * 2 + raw[end:],
            raw[:begin],
            raw + noise,
            raw[begin:end],
            raw.replace(raw[begin : begin + 1], noise[:1]),
            b"",
        )
    )


def mutate_document(rng: random.Random, raw: bytes) -> bytes:
    """Mutate JSON text: mostly its values, so that it stays JSON."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, raw)
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = mutate_json(rng, value)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def mutate_header(rng: random.Random, raw: bytes) -> bytes:
    """Mutate a safetensors file: its header's JSON, the length before it, or any byte of either."""
    n_header = int.from_bytes(raw[:8], "little")
    head, data = raw[8 : 8 + n_header], raw[8 + n_header :]
    match rng.randrange(8):
        case 0:
            length = rng.choice((0, 1, 2, n_header - 1, n_header + 1, len(raw), len(raw) - 8, 2**32, 2**63, 2**64 - 1))
            return length.to_bytes(8, "little") + head + data
        case 1:
            return mutate_bytes(rng, raw[: 8 + n_header]) + data
        case 2:
            return raw[:8] + head + mutate_bytes(rng, data)
        case _:
            head = mutate_document(rng, head)
            return len(head).to_bytes(8, "little") + head + data


def mutate_lines(rng: random.Random, raw: bytes) -> bytes:
    """Mutate a tiktoken file: lines swapped, dropped, doubled, or bytes."""
    lines = raw.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            lines[i], lines[j] = lines[j], lines[i]
        case 1:
            del lines[i]
        case 2:
            lines[i] = lines[i].split()[0] + b" " + rng.choice((b"-1", b"1e3", b"9" * 5000, b"\xd9\xa3", b"")) + b"\n"
        case 3:
            lines[i] = lines[j].split()[0] + b" " + lines[i].split()[1] + b"\n"
        case _:
            return mutate_bytes(rng, raw)
    return b"".join(lines)


def mutated(rng: random.Random, file: Path) -> bytes:
    if file.suffix == ".safetensors":
        return mutate_header(rng, file.read_bytes())
    if file.suffix == ".json":
        return mutate_document(rng, file.read_bytes())
    if file.suffix == ".tiktoken":
        return mutate_lines(rng, file.read_bytes())
    return mutate_bytes(rng, file.read_bytes())


# -- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    status: int
    lines: list[str]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def late(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(folder: Path, capsys: pytest.CaptureFixture[str]) -> Outcome:
    out = folder.parent / "out.gguf"
    with time_limit(SECONDS):
        status = main([str(folder), str(out), "-q"])
    captured = capsys.readouterr()
    assert captured.out == ""
    return Outcome(status, [line for line in captured.err.splitlines() if not line.startswith("warning: ")])


def check(folder: Path, outcome: Outcome, before: list[str]) -> None:
    """Either a file that can be read, or one line and nothing else."""
    out = folder.parent / "out.gguf"
    if outcome.status == 0:
        assert outcome.lines == []
        assert GGUFReader(out).tensors
        out.unlink()
    else:
        assert outcome.status == 1
        assert len(outcome.lines) == 1, outcome.lines
        assert outcome.lines[0].startswith("error: ")
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def fuzz(target: tuple[str, str], seeds: range, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Run every seed; give how many conversions were refused."""
    kind, pattern = target
    folder = WRITERS[kind](tmp_path / "made").rename(tmp_path / "in")
    shutil.rmtree(tmp_path / "made", ignore_errors=True)
    file = next(iter(sorted(folder.glob(pattern))))
    pristine = file.read_bytes()
    before = sorted(path.name for path in tmp_path.iterdir())
    refused = 0
    for seed in seeds:
        rng = random.Random(f"{kind} {pattern} {seed}")
        file.write_bytes(mutated(rng, file))
        try:
            outcome = attempt(folder, capsys)
            check(folder, outcome, before)
        except BaseException as exc:
            exc.add_note(f"seed {seed} of {target}: {file.read_bytes()[:400]!r}")
            raise
        refused += outcome.status
        file.write_bytes(pristine)
    return refused


def of_hundred(n: int, target: tuple[str, str]) -> int:
    return max(1, n * TARGETS[target] // 100)


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_some_mutations(target: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = range(of_hundred(300, target))
    refused = fuzz(target, seeds, tmp_path, capsys)
    if target[1] not in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        assert refused > len(seeds) // 4  # the mutations bite


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_thousands_of_mutations(target: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz(target, range(1000, 1000 + of_hundred(5000, target)), tmp_path, capsys)
