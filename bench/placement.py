"""Our plan against the best that a sweep over the stock engine's settings finds.

On the processor (the default), on a random Q4_K_M file with the layers of Hunyuan-A13B:
  ours         the arguments of the plan for this file and machine, tuned as `hy-plan --tune` does, on our engine
  sweep        the stock engine with every combination of repacking, threads and ubatch
  best         the setting of the sweep that takes the least time for a prompt of 4096 tokens and 500 of an answer
Speeds are the server's own, of one request with random tokens. Ours and the best of the sweep then take turns, first
the one and then the other in front; a ratio is the median of the turns'. Target: prefill and generation each 1.0.

--device: with the first GPU that the engine lists, and a file that does not fit into its memory: our plan, the stock
engine's `--fit on` with its defaults, and a sweep over ubatch and `--n-cpu-moe`, from the fewest layers that load on,
and over threads. No target. A plan leaves a software device alone, which is slower than the processor, unless it is
told otherwise (--as-card).

--card GIB: the same, as if the GPU were a card of so much memory (24, say): what an NVIDIA card has beyond that is
held meanwhile, and the file has all 32 layers (47 GB) unless --layers says otherwise. Ours, the best of the sweep and
`--fit on` then take turns. Targets: generation 1.0 of the best and of `--fit on`, prefill 1.5 of `--fit on`.

The engines are those of `hy-engine build --backend cuda`, and with `--stock` besides, whose folder --stock names.
The roofline beside our plan is the bytes that it reads for a token over the bandwidth of the memories they lie in.
Ends with status 1 where a target is missed. The file is kept in --work for the next run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

import ballast
from common import WORK, gigabytes, say
from serving import Setting, Speeds, Use, loads, measure, table, turns
from sized_model import Shape, layers_that_fit, n_bytes, write

if TYPE_CHECKING:
    from hymoe.runtime.machine import Machine
    from hymoe.runtime.planned import Plan

USE: Final = Use(4096, 500)  # what the best setting is chosen for
FULL: Final = 32  # layers of Hunyuan-A13B
BEST: Final = "the best of the sweep"
FIT: Final = "stock, --fit on"
# What a ratio of ours must be, by what it is compared to.
Targets = Mapping[str, Mapping[str, float]]
ON_PROCESSOR: Final[Targets] = {BEST: {"prefill": 1.0, "generation": 1.0}}
ON_CARD: Final[Targets] = {BEST: {"generation": 1.0}, FIT: {"prefill": 1.5, "generation": 1.0}}


@dataclass(frozen=True)
class Bench:
    """What is measured: a file of `n_layer` layers, for a use.

    stock: folder of the stock engine. common: arguments that every one of its servers gets. n_warm: tokens of a prompt
    before the one that counts.
    """

    gguf: Path
    n_layer: int
    use: Use
    stock: Path
    common: tuple[str, ...]
    n_turn: int
    n_warm: int

    def setting(self, name: str, *words: object) -> Setting:
        """Give a setting of the stock engine."""
        return Setting(f"stock, {name}", (*self.common, *map(str, words)), engine=self.stock)

    def measure(self, *settings: Setting) -> dict[Setting, Speeds | None]:
        return {setting: measure(self.gguf, setting, self.use, n_warm=self.n_warm) for setting in settings}


def main() -> int:
    options = parse()
    with card(options.card) if options.card else nullcontext():
        shape = Shape(options.layers or (FULL if options.card else layers_that_fit()), options.width, n_ff=options.ff)
        gguf = file_of(options.work, shape)
        plan = planned(options, gguf)
        about(plan, options, shape, gguf)
        common = ["--ctx-size", str(options.ctx), "--parallel", "1"]
        common += ["--device", plan.machine.devices[0].name if on_device(options) else "none"]
        # warming up reads all experts, which takes a software device minutes
        common += ["--no-warmup"] if on_device(options) else []
        n_warm = options.prompt if options.card else 2
        use = Use(options.prompt, options.answer)
        bench = Bench(gguf, shape.n_layer, use, options.stock, tuple(common), options.turns, n_warm)
        environment = tuple(plan.environment().items())
        ours = Setting("our plan", (*plan.arguments(), *(["--no-warmup"] if on_device(options) else [])), environment)
        return compare_on_device(bench, options, plan, ours) if on_device(options) else compare(bench, options, ours)


def parse() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", type=Path, required=True, help="folder of the stock engine, of the same backend")
    parser.add_argument("--device", action="store_true", help="with a GPU instead of on the processor alone")
    parser.add_argument("--card", type=float, default=0, help="GiB of the card that the GPU stands for")
    parser.add_argument("--as-card", action="store_true", help="plan as if a software device were as fast as a card")
    parser.add_argument("--layers", type=int, default=0, help="0: what half of the free memory holds")
    parser.add_argument("--width", type=int, default=4096, help="n_embd [%(default)s]")
    parser.add_argument("--ff", type=int, default=3072, help="n_ff of an expert [%(default)s]")
    parser.add_argument("--prompt", type=int, default=USE.prompt, help="tokens [%(default)s]")
    parser.add_argument("--answer", type=int, default=48, help="tokens [%(default)s]")
    parser.add_argument("--ctx", type=int, default=8192, help="tokens [%(default)s]")
    parser.add_argument("--threads", type=numbers, default=[*{max(1, cores // 2), cores}], help="of the sweep")
    parser.add_argument("--ubatches", type=numbers, default=[512, 1024, 2048, 4096], help="of the sweep")
    parser.add_argument("--turns", type=int, default=3, help="of ours and the others [%(default)s]")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the file [build/bench]")
    options = parser.parse_args()
    options.ubatches = [n for n in options.ubatches if n <= options.prompt] or options.ubatches[:1]
    return options


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def on_device(options: argparse.Namespace) -> bool:
    return bool(options.device or options.card)


# -- what is measured --------------------------------------------------------------------------------------------------


def card(gib: float) -> AbstractContextManager[None]:
    """Hold what the first GPU has beyond a card of so many GiB with a desktop on it."""
    from hymoe.runtime import machine
    from hymoe.sizes import DESKTOP_VRAM

    devices = machine.probe().devices
    if not devices:
        raise SystemExit("--card: the engine lists no GPU (is HYMOE_ENGINE one that was built for it?)")
    want = int(gib * 2**30) - DESKTOP_VRAM
    return ballast.leave(want) if devices[0].free > want else nullcontext()


def file_of(work: Path, shape: Shape) -> Path:
    """Give the file of a shape, written where it is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    gguf = work / f"placement-{shape.n_layer}-{shape.n_embd}-{shape.n_ff}.gguf"
    if not gguf.exists():
        size, room = n_bytes(shape), shutil.disk_usage(work).free
        if size > room:
            raise SystemExit(f"{work}: has {gigabytes(room)} free, the file takes {gigabytes(size)}; name --work")
        say(f"writing {gguf}, {gigabytes(size)}")
        write(gguf, shape)
    return gguf


def planned(options: argparse.Namespace, gguf: Path) -> Plan:
    """Give our plan, made as hy-plan makes it."""
    from hymoe.runtime import layout, machine, settle, tune
    from hymoe.runtime.planned import Wish

    here = machine.probe()
    here = replace(here, devices=here.devices[:1] if on_device(options) else ())
    if options.as_card:
        here = as_card(here)
    tuned = tune.known(gguf, here)
    if tuned is None and not on_device(options):  # what is tuned is the processor's part
        tuned = tune.tune(gguf, here)
    return settle.settle(gguf, layout.read(gguf), here, Wish(n_ctx=options.ctx, n_parallel=1), tuned)


def as_card(here: Machine) -> Machine:
    from hymoe.runtime.machine import PAPER_LINK, PAPER_VRAM_BANDWIDTH

    link, rate = PAPER_LINK, PAPER_VRAM_BANDWIDTH
    fast = (replace(device, bandwidth=rate, link=link, link_pageable=link, pace=None) for device in here.devices)
    return replace(here, devices=tuple(fast))


def about(plan: Plan, options: argparse.Namespace, shape: Shape, gguf: Path) -> None:
    words = [*("=".join(pair) for pair in plan.environment().items()), *plan.arguments()]
    print(f"{shape.n_layer} layers of width {shape.n_embd}, {gigabytes(gguf.stat().st_size)}")
    print(f"prompt of {options.prompt} tokens, {options.answer} generated")
    for device in plan.machine.devices:
        print(f"{device.name}: {device.description}, {gigabytes(device.free)} free")
    print(f"our plan: {' '.join(words)}")
    print(f"it predicts {plan.speeds.prefill:.2f} tokens/s reading and {plan.speeds.generation:.2f} writing")
    print(f"roofline of writing: {roof(plan):.2f} tokens/s, {' and '.join(read(plan))}")


def bandwidths(plan: Plan) -> dict[str, float]:
    """Give the bytes/s of each memory of a plan: the RAM's as measured, a card's by its maker where that is known."""
    from hymoe.runtime.planned import RAM

    known = {device.name: device.bandwidth for device in plan.devices} | {RAM: plan.machine.bandwidth}
    return {name: known[name] or rate for name, rate in plan.speeds.rates.items()}


def read(plan: Plan) -> Iterator[str]:
    for name, rate in bandwidths(plan).items():
        yield f"{gigabytes(plan.speeds.read[name])} of {name} at {rate / 1e9:.0f} GB/s"


def roof(plan: Plan) -> float:
    """Give the tokens/s that reading alone allows."""
    return 1 / sum(plan.speeds.read[name] / rate for name, rate in bandwidths(plan).items())


# -- on the processor --------------------------------------------------------------------------------------------------


def compare(bench: Bench, options: argparse.Namespace, ours: Setting) -> int:
    swept = bench.measure(*on_processor(bench, options))
    table({setting.name: speeds for setting, speeds in swept.items()}, USE)
    return verdict(bench, ours, {BEST: told(swept)}, ON_PROCESSOR)


def on_processor(bench: Bench, options: argparse.Namespace) -> Iterator[Setting]:
    for repack, threads, ubatch in product((True, False), sorted(options.threads), options.ubatches):
        words = ["--fit", "off", "--threads", threads, "--ubatch-size", ubatch] + ([] if repack else ["--no-repack"])
        yield bench.setting(f"{'repacked' if repack else 'as stored'}, {threads} threads, ubatch {ubatch}", *words)


# -- with a device -----------------------------------------------------------------------------------------------------


def compare_on_device(bench: Bench, options: argparse.Namespace, plan: Plan, ours: Setting) -> int:
    fit = bench.setting("--fit on", "--fit", "on")
    swept = bench.measure(*(setting for ubatch in options.ubatches for setting in on_card(bench, ubatch)))
    best = best_of(swept)
    swept |= bench.measure(*(with_threads(best, n) for n in options.threads))
    rows = bench.measure(ours, fit)
    table({setting.name: speeds for setting, speeds in (rows | swept).items()}, USE)
    best, mine = told(swept), rows[ours]
    if mine is None:
        return 1
    print(f"of the roofline our plan has {mine.generation / roof(plan):.2f}")
    if not options.card:
        return 0
    return verdict(bench, ours, {BEST: best, FIT: fit}, ON_CARD)


def on_card(bench: Bench, ubatch: int) -> Iterator[Setting]:
    """Give the settings of an ubatch with the fewest layers' experts in RAM that load, and one more."""

    def setting(n: int) -> Setting:
        words = ("--fit", "off", "--gpu-layers", 99, "--n-cpu-moe", n)
        batch = ("--batch-size", max(2048, ubatch), "--ubatch-size", ubatch)
        return bench.setting(f"--n-cpu-moe {n}, ubatch {ubatch}", *words, *batch)

    fewest, most = 0, bench.n_layer
    while fewest < most:
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if loads(bench.gguf, setting(middle)) else (middle + 1, most)
    yield from (setting(n) for n in (fewest, fewest + 1) if n <= bench.n_layer)


def with_threads(setting: Setting, n: int) -> Setting:
    return replace(setting, name=f"{setting.name}, {n} threads", arguments=(*setting.arguments, "--threads", str(n)))


# -- judging -----------------------------------------------------------------------------------------------------------


def best_of(swept: Mapping[Setting, Speeds | None]) -> Setting:
    """Give the setting that takes the least time."""
    loaded = {setting: speeds for setting, speeds in swept.items() if speeds}
    if not loaded:
        raise SystemExit("no setting of the sweep loads")
    return min(loaded, key=lambda setting: loaded[setting].seconds(USE))


def told(swept: Mapping[Setting, Speeds | None]) -> Setting:
    """Give the best setting, and say how near it comes to the best of each speed."""
    best = best_of(swept)
    print(f"best of the sweep for {USE.prompt} + {USE.answer} tokens: {best.name}")
    for name in ("prefill", "generation"):  # no one setting need be the best of both
        share = getattr(swept[best], name) / max(getattr(speeds, name) for speeds in swept.values() if speeds)
        print(f"  which has {share:.3f} of the {name} that any setting of the sweep has")
    return best


def verdict(bench: Bench, ours: Setting, others: Mapping[str, Setting], targets: Targets) -> int:
    """Let all take turns, print each ratio of ours with its target; 1 where one is missed."""
    found = turns(bench.gguf, [ours, *others.values()], bench.use, bench.n_turn, n_warm=bench.n_warm)
    missed = 0
    for column, other in enumerate(others, 1):
        for name, target in targets[other].items():
            ratios = [getattr(turn[0], name) / getattr(turn[column], name) for turn in found]
            missed += median(ratios) < target
            print(f"{name} by {other}: {median(ratios):.3f}   target {target}   all turns {listed(ratios)}")
    return 1 if missed else 0


def listed(ratios: Sequence[float]) -> str:
    return " ".join(f"{ratio:.3f}" for ratio in ratios)


if __name__ == "__main__":
    from hymoe.runtime.process import signals_as_exceptions

    with signals_as_exceptions():  # so that no server stays
        sys.exit(main())
