"""A plan with measured buffers: search by formula, ask the engine, and search again where it differs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from hymoe import console
from hymoe.errors import PlacementError
from hymoe.runtime import buffers, plan
from hymoe.runtime.buffers import Breakdown
from hymoe.runtime.layout import Layout
from hymoe.runtime.machine import Device, Machine
from hymoe.runtime.planned import RAM, Plan, Setting, Wish
from hymoe.runtime.tune import Tuned

# Every round measures a setting, or one more placement of it; two or three are usual.
MAX_ROUNDS: Final = 64


def settle(file: Path, layout: Layout, machine: Machine, wish: Wish, tuned: Tuned | None = None) -> Plan:
    """Make the best plan whose buffers the engine itself has counted. file: what `layout` was read from.

    Raises PlacementError where nothing fits, EngineError where the engine refuses the model.
    """
    known: dict[object, dict[str, int]] = {}

    def compute(layout: Layout, setting: Setting, devices: tuple[Device, ...]) -> Mapping[str, int]:
        return known.get(_key(setting, devices)) or plan.predicted(layout, setting, devices)

    for _ in range(MAX_ROUNDS):
        found = plan.make(layout, machine, wish, tuned, compute)
        counted = _counted(file, found)
        refused = _refused(found, counted)
        # the output matrix alone may be larger than a device takes a tensor
        without = [m.name for m in found.memories if m.experts and refused.get(m.name, 0) > m.output]
        if without:
            console.warn(f"{', '.join(without)}: no kernel for this model's experts; all of them stay in RAM")
            machine = _without_experts(machine, without)
            continue
        measured = {name: memory.compute for name, memory in counted.items()}
        measured[RAM] += sum(refused.values())
        exact = replace(found, memories=tuple(replace(m, compute=measured[m.name]) for m in found.memories))
        key = _key(found.setting, found.devices)
        if key in known and all(memory.free >= 0 for memory in exact.memories):
            _warn(refused)
            return exact
        # what one placement needs, another of the same setting may need too
        before = known.get(key, {})
        known[key] = {name: max(n_bytes, before.get(name, 0)) for name, n_bytes in measured.items()}
    raise PlacementError(f"{layout.name}: no placement came out that the engine counts as planned")


def _key(setting: Setting, devices: tuple[Device, ...]) -> object:
    """What buffers depend on besides the placement."""
    return replace(setting, load="mmap", cache_ram=0), tuple(device.name for device in devices)


def _counted(file: Path, found: Plan) -> dict[str, Breakdown]:
    """Give what the engine counts for a plan, by memory."""
    answer = buffers.measure(file, found.arguments(), cards=found.machine.cards, min_batch=found.setting.stream_from)
    return {RAM if name == buffers.HOST else name: memory for name, memory in answer.items()}


def _warn(refused: Mapping[str, int]) -> None:
    for name, n_bytes in refused.items():
        kept = f"{console.format_bytes(n_bytes)} of the weights that would lie there"
        console.warn(f"{name} does not compute on {kept}; they are counted, and stay, in RAM")


def _without_experts(machine: Machine, names: Collection[str]) -> Machine:
    """Give the machine with devices that compute no experts."""
    devices = (
        replace(device, takes_experts=device.takes_experts and device.name not in names) for device in machine.devices
    )
    return replace(machine, devices=tuple(devices))


def _refused(found: Plan, counted: Mapping[str, Breakdown]) -> dict[str, int]:
    """Give the bytes of weights that each device was to hold and does not.

    The engine keeps a weight in RAM where a device has no kernel for it; on Vulkan that depends on the card.
    """
    missing = {memory.name: memory.weights - counted[memory.name].weights for memory in found.memories[:-1]}
    return {name: n_bytes for name, n_bytes in missing.items() if n_bytes > 0}
