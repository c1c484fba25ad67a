"""What no formula knows, measured once for a machine and a kind of model (`hy-plan --tune`, about a minute).

Whether repacked weights are faster depends on the processor, the types, and on whether tokens come one by one or by
the hundred; how many threads the memory feeds, and which ubatch its caches like, on the machine. llama-bench measures
on two layers of the model itself, cut out into a file that is removed again.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from hymoe import console
from hymoe.errors import EngineError, PlacementError
from hymoe.runtime import bandwidth, layout, measuring, process, quiet
from hymoe.runtime.bandwidth import Pace
from hymoe.runtime.header import parts
from hymoe.runtime.machine import Machine
from hymoe.runtime.sample import layers, n_bytes, sample

METHOD: Final = 2  # of tuning; another number and what was found before is no more asked for
UBATCHES: Final = (512, 1024, 2048)
N_PROMPT: Final = 512
N_ANSWER: Final = 24
# Attention counts where there is something to attend to.
N_DEPTH: Final = 1024
# Every speed is the better of so many runs: other work on the machine only ever makes one slower.
N_RUN: Final = 2
# What takes more memory has to be worth it, and no chance: a larger ubatch, and the scores without flash attention,
# which grow with the context while two runs of one setting differ by a tenth.
WORTH: Final = 1.05
WORTH_SCORES: Final = 1.15
# A prompt and its answer, in tokens: the settings are those that take the least time for both.
USE: Final = (4096, 500)


@dataclass(frozen=True)
class Tuned:
    """The fastest settings. threads: for generation; threads_batch: for prompts; ubatch: tokens, on the processor.

    stored, repacked: what the processor did with the model's weights in either layout.
    """

    repack: bool
    threads: int
    threads_batch: int
    ubatch: int
    flash: bool
    stored: Pace | None = None
    repacked: Pace | None = None

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Make what `asdict` gave, or gave before there were paces."""
        paces = {name: Pace.of(saved.get(name)) for name in ("stored", "repacked")}
        return cls(**{**saved, **paces})


Row = Mapping[str, Any]
# llama-bench's options, without the dashes, and the values that are tried, every combination
Options = Mapping[str, tuple[int, ...]]
Bench = Callable[[Options], list[Row]]


def tune(model: Path, machine: Machine) -> Tuned:
    """Measure, and remember it for this processor and models of these types and shapes.

    Raises PlacementError where there are no weights or the sample does not fit into RAM, OutputError where there is no
    room for it on the disk, ModelFileError for what is no model, EngineError where the engine fails.
    """
    about = layout.read(model)
    _require(model, about, machine)
    watch = quiet.Watch()
    with (
        process.signals_as_exceptions(),  # a sample is gigabytes: it goes however we end
        sample(model, measuring.folder()) as file,
        console.progress("tuning", _n_rows(machine), unit="%") as tick,
    ):
        found = _search(lambda options: _rows(file, options, tick), about, machine)
    if watch.busy():
        console.warn("other programs ran meanwhile, which makes all speeds too low: tune again when nothing else runs")
    measuring.keep("tuned", _key(about, machine), asdict(found))
    return found


def _require(model: Path, about: layout.Layout, machine: Machine) -> None:
    stored = sum(part.stat().st_blocks * 512 for part in parts(model))
    if 2 * stored < about.n_bytes:  # a hole: its router would choose the same experts for every token
        raise PlacementError(f"{model}: tuning needs the weights", fix="convert the checkpoint first")
    size = n_bytes(about)
    if 2 * size > machine.ram_usable:  # the file's pages, and the weights repacked
        have, want = (f"{n / 1e9:.1f} GB" for n in (machine.ram_usable, 2 * size))
        raise PlacementError("tuning loads two layers, which do not fit into RAM", got=have, expected=want)


def known(model: Path, machine: Machine) -> Tuned | None:
    """Give what `tune` found before; None where it was not asked."""
    found = measuring.recall("tuned", _key(layout.read(model), machine))
    return None if found is None else Tuned.from_json(found)


def candidates(machine: Machine) -> tuple[int, ...]:
    """Give the numbers of threads worth trying: half the performance cores, all of them, and all cores."""
    return tuple(sorted({max(1, machine.n_fast_core // 2), machine.n_fast_core, machine.n_core}))


def _key(about: layout.Layout, machine: Machine) -> object:
    """A kind of model: the types and shapes of its tensors, whatever their number."""
    kinds = sorted({(tensor.name.split(".", 2)[-1], tensor.shape, tensor.type) for tensor in about.tensors})
    return {"method": METHOD, "cpu": bandwidth.cpu_name(), "threads": candidates(machine), "kinds": kinds}


def _search(bench: Bench, about: layout.Layout, machine: Machine) -> Tuned:
    """Choose one setting after the other, the one that decides most first."""
    threads = candidates(machine)
    both = {"n-prompt": (N_PROMPT,), "n-gen": (N_ANSWER,)}
    rows = bench({**both, "repack": (0, 1), "threads": threads})
    by_choice = {choice: [row for row in rows if row["repack"] == choice] for choice in (0, 1)}
    repack = min((0, 1), key=lambda choice: _seconds(by_choice[choice]))
    answers = {choice: _fastest(_answers(rows)) for choice, rows in by_choice.items()}
    prompts = {choice: _fastest(_prompts(rows)) for choice, rows in by_choice.items()}
    few, many = answers[repack]["n_threads"], prompts[repack]["n_threads"]
    fixed = {"repack": (repack,), "threads": (many,)}
    rows = bench({**fixed, "n-prompt": UBATCHES[-1:], "n-gen": (0,), "ubatch-size": UBATCHES})
    worthy = [row for row in rows if WORTH * _speed(row) >= _speed(_fastest(rows))]
    prompts[repack] = min(worthy, key=lambda row: row["n_ubatch"])
    ubatch = (prompts[repack]["n_ubatch"],)
    deep = {"n-prompt": ubatch, "n-gen": (N_ANSWER,), "n-depth": (N_DEPTH,), "ubatch-size": ubatch}
    rows = bench({**fixed, **deep, "flash-attn": (0, 1)})
    without, with_flash = (_seconds([row for row in rows if row["flash_attn"] == choice]) for choice in (0, 1))
    paces = [_pace(about, prompts[choice], answers[choice]) for choice in (0, 1)]
    return Tuned(bool(repack), few, many, *ubatch, with_flash <= WORTH_SCORES * without, *paces)


def _pace(about: layout.Layout, prompt: Row, answer: Row) -> Pace:
    """Say what the processor did with the sample's layers; of its output matrix nearly nothing is left.

    Of the last of them a prompt needs attention alone.
    """
    share = about.shape.n_expert_used / about.shape.n_expert
    chosen = [about.layers[index] for index in layers(about)]
    n_bytes = sum(layer.dense + share * layer.experts for layer in chosen)
    n_params = sum(layer.dense_params + share * layer.expert_params for layer in chosen[:-1])
    n_params += chosen[-1].attention_params
    return Pace(read=n_bytes * _speed(answer), ops=2 * n_params * _speed(prompt))


def _n_rows(machine: Machine) -> int:
    """Number of results that `_search` asks for."""
    return 2 * 2 * len(candidates(machine)) + len(UBATCHES) + 2 * 2


def _prompts(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["n_prompt"]]


def _answers(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["n_gen"]]


def _speed(row: Row) -> float:
    """Tokens per second."""
    return float(max(row["samples_ts"]))


def _fastest(rows: list[Row]) -> Row:
    return max(rows, key=_speed)


def _seconds(rows: list[Row]) -> float:
    """Time of a prompt and its answer, each at the best of these speeds."""
    best = (_fastest(_prompts(rows)), _fastest(_answers(rows)))
    return sum(n_tokens / _speed(row) for n_tokens, row in zip(USE, best, strict=True))


def _rows(file: Path, options: Options, tick: console.Tick) -> list[Row]:
    """Run llama-bench on the processor alone, and give a row for each combination of the options' values."""
    from hymoe import engine

    command = [str(engine.find().tool("llama-bench")), "--model", str(file), "--device", "none"]
    command += ["--output", "jsonl", "--no-warmup", "--repetitions", str(N_RUN), "--batch-size", str(UBATCHES[-1])]
    for name, values in ({"flash-attn": (1,)} | dict(options)).items():
        command += [f"--{name}", ",".join(map(str, values))]
    rows: list[Row] = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            command,
            env=engine.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as bench,
    ):
        assert bench.stdout
        try:
            for line in bench.stdout:
                rows.append(json.loads(line))
                tick(1)
        except BaseException:
            bench.kill()
            raise
        if bench.wait():
            log.seek(0)
            raise EngineError("llama-bench failed", got=measuring.reason(log.read(), bench.returncode))
    return rows
