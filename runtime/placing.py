"""Give a server the placement plan for its model on this machine, unless its options place the model themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hymoe import console
from hymoe.errors import PlacementError
from hymoe.runtime import header
from hymoe.runtime.server import ServerOptions, check_flags, context_size
from hymoe.runtime.workers import WorkerError

if TYPE_CHECKING:
    from hymoe.runtime.machine import Machine
    from hymoe.runtime.planned import Plan, Wish

# llama-server arguments that say where something goes: whoever gives one of them places the model.
PLACING: Final = frozenset(
    {
        *("-ngl", "--gpu-layers", "--n-gpu-layers", "-ot", "--override-tensor", "-cmoe", "--cpu-moe", "-ncmoe"),
        *("--n-cpu-moe", "-dev", "--device", "-ts", "--tensor-split", "-sm", "--split-mode", "-mg", "--main-gpu"),
        *("-fit", "--fit", "-fitt", "--fit-target", "-fitc", "--fit-ctx", "-nkvo", "--no-kv-offload"),
    }
)
# Those that a plan has to reckon with -> the wish that they are.
WISHES: Final = {
    **dict.fromkeys(("-ub", "--ubatch-size"), "n_ubatch"),
    **dict.fromkeys(("-np", "--parallel"), "n_parallel"),
    **dict.fromkeys(("-ctk", "--cache-type-k"), "kv_type"),
    **dict.fromkeys(("-ctv", "--cache-type-v"), "v_type"),
    **dict.fromkeys(("-fa", "--flash-attn"), "flash"),
}
# What the engine takes for on and off; "auto" leaves it to the plan.
SWITCH: Final = {
    **dict.fromkeys(("on", "enabled", "true", "1"), True),
    **dict.fromkeys(("off", "disabled", "false", "0"), False),
}
ENGINE_KV_TYPE: Final = "f16"  # of keys and of values, each where it is not given
# Of what a plan took of a memory that was too small for it: what the next one may count on.
LESS: Final = 0.9


def place(options: ServerOptions) -> ServerOptions:
    """Give the options with a plan, or as they are where they place the model themselves, which is said.

    Raises PlacementError where nothing fits, ModelFileError, ServerError and EngineError as `Server` does.
    """
    from hymoe import engine
    from hymoe.runtime.machine import probe

    check_flags(options.extra)
    about = header.peek(options.model)
    engine.find().tool("llama-server")
    if given := [word for word in options.extra if word.split("=", 1)[0] in PLACING]:
        console.status(f"placed as {given[0]} says, without a plan")
        return options
    n_ctx = None if options.ctx is None else context_size(options.ctx, about)
    wish = replace(_wish(options, about), n_ctx=n_ctx)
    return replace(options, plan=_plan(options.model, probe(threads=options.threads, rpc=options.rpc), wish))


def smaller(options: ServerOptions, complaints: Sequence[str]) -> ServerOptions | None:
    """Give the options with a plan that takes less of the memory that was too small; None where there is none.

    complaints: what the engine's log says of it. Where that names neither a device of the plan nor a buffer of the
    host's, it is all devices; where it says nothing, as of a process that the kernel has killed, it is RAM.
    """
    from hymoe.runtime.machine import probe
    from hymoe.sizes import DEVICE_MARGIN, RAM_MARGIN

    if options.plan is None:
        return None
    memories = options.plan.memories
    took = {memory.name: _with_margin(memory.used, DEVICE_MARGIN) for memory in memories[:-1]}
    text = " ".join(complaints)
    named = {device.name for device in options.plan.devices if device.name in text}
    if text and not named and not re.search(r"\bCPU|_Host\b", text):
        named = {device.name for device in options.plan.devices}
    try:
        machine = probe(threads=options.threads, rpc=options.rpc)
    except WorkerError:  # the next start says so, and can wait for it
        return None
    devices = tuple(
        replace(device, free=min(device.free, took[device.name])) if device.name in named else device
        for device in machine.devices
    )
    ram = _with_margin(memories[-1].used, RAM_MARGIN)
    ram = machine.ram_usable if named else min(machine.ram_usable, ram)
    try:
        plan = _plan(options.model, replace(machine, devices=devices, ram_usable=ram), options.plan.wish)
    except PlacementError:
        return None
    return replace(options, plan=plan)


def _with_margin(used: int, rule: tuple[float, int]) -> int:
    """Give the bytes of a memory that leave LESS of what was used, beside the margin that any plan leaves."""
    return int((LESS * used + rule[1]) / (1 - rule[0]))


def summary(plan: Plan) -> str:
    """Say in a line what a plan does."""
    setting, n_layer = plan.setting, plan.layout.shape.n_layer
    parts = [
        f"{run.last - run.first} of {n_layer} layers on {device.name}, {len(run.experts)} with their experts"
        for device, run in zip(plan.devices, plan.runs, strict=True)
    ]
    parts += [f"context {setting.n_ctx}, {setting.kv_type} cache"]
    parts += [f"about {plan.speeds.prefill:.0f} tokens/s reading and {plan.speeds.generation:.1f} writing"]
    return f"plan: {'; '.join([*parts[:-2], ', '.join(parts[-2:])])} (hy-plan says more)"


def _plan(model: Path, machine: Machine, wish: Wish) -> Plan:
    from hymoe.runtime import layout, tune
    from hymoe.runtime.settle import settle

    about = layout.read(model)
    header.require_data(header.read(model))
    return settle(model, about, machine, wish, tune.known(model, machine))


def _wish(options: ServerOptions, about: header.Header) -> Wish:
    from hymoe.runtime.plan_cli import lockable
    from hymoe.runtime.planned import Wish
    from hymoe.runtime.router import engine_arguments

    # What "capacity" needs, and nothing else, whoever asked for it.
    whole = "--no-cache-prompt" in engine_arguments(options.router, about, 0)
    return Wish(rpc=options.rpc, whole_prompts=whole, lockable=lockable(), **_wished(options.extra))


def _wished(extra: tuple[str, ...]) -> Mapping[str, Any]:
    """Read what `extra` has of a plan's wishes; the engine says what is wrong with a value.

    Raises PlacementError for values of another type than the keys, which no plan counts.
    """
    found = dict(_pairs(extra))
    if (values := found.pop("v_type", None)) is None:
        return found
    keys = found.get("kv_type", ENGINE_KV_TYPE)
    if values != keys:
        fix = "a cache of two types can be served without a plan: give --fit on too"
        raise PlacementError("KV type", got=f"{values} for values, {keys} for keys", expected="one for both", fix=fix)
    return {**found, "kv_type": values}


def _pairs(extra: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for flag, value in pairwise(extra):
        field = WISHES.get(flag)
        if field in ("kv_type", "v_type"):
            yield field, value
        elif field == "flash":
            yield field, SWITCH.get(value)
        elif field is not None and value.isdecimal() and int(value) > 0:
            yield field, int(value)
