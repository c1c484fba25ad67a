"""Making the placement plan: which of a model's bytes lie where, and how the engine is set.

`make` tries every combination of a few settings (cache type, ubatch, whether experts in RAM are sent to a GPU for
prompts, which devices take part) and for each the best placement of layers, and takes the one with the least predicted
time for the stated use. Nothing is measured here and no file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Final, NamedTuple

from hymoe.errors import PlacementError
from hymoe.runtime import buffers, placement, scratch
from hymoe.runtime.forecast import Costs, speeds
from hymoe.runtime.layout import Layout
from hymoe.runtime.machine import Device, Machine, repacks, stream_device
from hymoe.runtime.placement import Room, Run, Weights
from hymoe.runtime.planned import PURPOSES, RAM, LoadMode, Memory, Plan, Setting, Wish
from hymoe.runtime.roofline import Use
from hymoe.runtime.router import MAX_WHOLE_PROMPT
from hymoe.runtime.tune import Tuned
from hymoe.sizes import DEVICE_MARGIN, MIB, RAM_MARGIN, margin

LEAST_CTX: Final = 4096
N_UBATCH: Final = (512, 1024, 2048, 4096)
# How much faster a coarser cache must make the use to be worth its loss, and where the processor has to unpack it, to
# be no slower than it looks. Other types only where they are asked for.
KV_WORTH: Final = {"f16": 1.0, "q8_0": 1.03}
KV_WORTH_HOST: Final = {"f16": 1.0, "q8_0": 1.25}

PROCESS_BYTES: Final = 400 * MIB  # the server without the model: libraries, vocabulary, HTTP threads
CACHE_RAM_MIB: Final = 8192  # llama-server's default for saved prompts
MAX_SUBSETS: Final = 4  # up to so many devices every subset is tried

# Bytes of compute buffers that a setting needs with these devices, by memory: a device's name, or RAM.
Compute = Callable[[Layout, Setting, tuple[Device, ...]], Mapping[str, int]]


def make(
    layout: Layout,
    machine: Machine,
    wish: Wish | None = None,
    tuned: Tuned | None = None,
    compute: Compute | None = None,
) -> Plan:
    """Make the best plan. compute: by formula where nobody measures.

    Raises PlacementError where nothing fits, saying by how much and what would.
    """
    wish = wish or Wish()
    _check(layout, wish)
    compute = compute or predicted
    for n_ctx in contexts(layout, wish):
        plan = _best(_Search(layout, machine, wish, tuned, compute, n_ctx))
        if plan is not None:
            return plan
    from hymoe.runtime.shortage import shortage

    raise shortage(layout, machine, wish, compute)


def fits(layout: Layout, machine: Machine, wish: Wish | None = None, compute: Compute | None = None) -> bool:
    """Whether there is any plan, however slow. Raises PlacementError for a wish that the model cannot have."""
    wish = wish or Wish()
    _check(layout, wish)
    least = contexts(layout, wish)[-1]
    search = _Search(layout, machine, wish, None, compute or predicted, least)
    return any(
        _placed(search, devices, setting, (_least_ram,))
        for devices in _subsets(machine.devices)
        for setting in search.settings(devices)
        if setting.n_ubatch == min(search.ubatches(devices))
    )


def _check(layout: Layout, wish: Wish) -> None:
    if wish.purpose not in PURPOSES:
        raise PlacementError("purpose", got=wish.purpose, expected=f"one of {', '.join(PURPOSES)}")
    if wish.kv_type is not None and wish.kv_type not in layout.kv_types():
        why = "a cache of another type can be served without a plan: give --fit on too"
        if len(layout.kv_types()) == 1:
            why = f"heads of {layout.shape.head_dim} are no multiple of 32"
        raise PlacementError("KV type", got=wish.kv_type, expected=f"one of {', '.join(layout.kv_types())}", fix=why)
    if wish.flash is False and wish.kv_type not in (None, "f16"):
        fix = "it takes flash attention to read a coarser one"
        raise PlacementError("KV type without flash attention", got=wish.kv_type, expected="f16", fix=fix)


def contexts(layout: Layout, wish: Wish) -> list[int]:
    """Give the contexts to try: what is asked for, or what the purpose wants and halves of that."""
    trained = layout.shape.n_ctx_train
    if wish.n_ctx is not None:
        n_ctx = wish.n_ctx or trained or PURPOSES[wish.purpose][1]
        return [min(n_ctx, trained or n_ctx)]
    n_ctx = PURPOSES[wish.purpose][1]
    found = [min(n_ctx, trained or n_ctx)]
    while found[-1] >= 2 * LEAST_CTX:
        found.append(found[-1] // 2)
    return found


def predicted(layout: Layout, setting: Setting, devices: tuple[Device, ...]) -> dict[str, int]:
    """Give the compute buffers by formula, as if some layers' experts were in RAM."""
    about = (layout, setting.n_ctx, setting.n_ubatch)
    target = stream_device(devices) if setting.stream_from is not None else None
    found = {
        device.name: scratch.on_device(*about, setting.kv_type, flash=setting.flash, sent=device is target)
        for device in devices
    }
    computes = target is None
    return found | {RAM: scratch.on_host(*about, flash=setting.flash, has_layers=not devices, has_experts=computes)}


@dataclass(frozen=True)
class _Search:
    """What one search is about: everything that is fixed while settings are tried."""

    layout: Layout
    machine: Machine
    wish: Wish
    tuned: Tuned | None
    compute: Compute
    n_ctx: int

    @property
    def use(self) -> Use:
        """The prompt and the answer to be made fast."""
        return self.wish.use(self.n_ctx)

    def settings(self, devices: Sequence[Device]) -> Iterator[Setting]:
        """Give every setting to try with these devices."""
        able = self.layout.kv_types()[:1] if self.wish.flash is False else self.layout.kv_types()
        kv_types = [self.wish.kv_type] if self.wish.kv_type else [t for t in able if t in KV_WORTH]
        streams: list[int | None] = [None]
        if stream_device(devices) is not None:
            streams = [None, buffers.offload_batch(self.layout.shape.n_expert, self.layout.shape.n_expert_used)]
        for kv_type, n_ubatch, stream in product(kv_types, self.ubatches(devices), streams):
            if stream is None or stream <= n_ubatch:
                found = self._setting(devices, kv_type, n_ubatch, stream)
                yield from (replace(found, repack=repack) for repack in self._repack(devices))

    def ubatches(self, devices: Sequence[Device]) -> Sequence[int]:
        """Give every ubatch to try with these devices, none larger than the context."""
        return sorted({min(n_ubatch, self.n_ctx) for n_ubatch in self._ubatches(devices)})

    def _ubatches(self, devices: Sequence[Device]) -> Sequence[int]:
        if self.wish.whole_prompts:
            return (min(self.n_ctx, MAX_WHOLE_PROMPT),)
        if self.wish.n_ubatch is not None:
            return (self.wish.n_ubatch,)
        if self.tuned is not None and not devices:
            return (self.tuned.ubatch,)
        return N_UBATCH

    def _setting(self, devices: Sequence[Device], kv_type: str, n_ubatch: int, stream: int | None) -> Setting:
        tuned = self.tuned
        return Setting(
            self.n_ctx,
            kv_type,
            n_ubatch,
            stream,
            flash=self._flash(devices, kv_type),
            repack=True,
            threads=tuned.threads if tuned else self.machine.n_fast_core,
            threads_batch=tuned.threads_batch if tuned else self.machine.n_core,
        )

    def _repack(self, devices: Sequence[Device]) -> tuple[bool, ...]:
        if not repacks(devices):
            return (True,)
        if self.tuned is not None:
            return (self.tuned.repack,)
        return (True, False) if self.machine.stored and self.machine.repacked else (True,)

    def _flash(self, devices: Sequence[Device], kv_type: str) -> bool:
        if self.wish.flash is not None:
            return self.wish.flash
        # tuned is the processor; values of a cache in blocks can only be read by flash attention
        return self.tuned is None or self.tuned.flash or bool(devices) or kv_type != "f16"


def _best(search: _Search) -> Plan | None:
    """Try all settings with all subsets of devices."""
    found: tuple[float, Plan] | None = None
    for devices in _subsets(search.machine.devices):
        for setting in search.settings(devices):
            option = _option(search, devices, setting)
            if option is not None and (found is None or option[0] < found[0]):
                found = option
    return None if found is None else found[1]


def _subsets(devices: Sequence[Device]) -> Iterator[tuple[Device, ...]]:
    """Give the sets of devices to try, of like ones each number once; of many devices, those in front."""
    if len(devices) > MAX_SUBSETS:
        yield from (tuple(devices[:count]) for count in range(len(devices) + 1))
        return
    seen = set()
    for count in range(len(devices) + 1):
        for subset in combinations(devices, count):
            alike = tuple(
                (device.kind, device.free, device.bandwidth, device.link, device.pace, device.takes_experts)
                for device in subset
            )
            if alike not in seen:
                seen.add(alike)
                yield subset


class _Placed(NamedTuple):
    """A placement that fits."""

    runs: tuple[Run, ...]
    memories: tuple[Memory, ...]
    costs: Costs


_Attempt = Callable[[Weights, Sequence[Room], Costs], tuple[Run, ...] | None]


def _option(search: _Search, devices: Sequence[Device], setting: Setting) -> tuple[float, Plan] | None:
    """Find the best plan for a setting, and its score; None where none fits."""
    placed = _placed(search, devices, setting, (_fastest, _least_ram))
    return None if placed is None else _finished(search, devices, setting, placed)


def _placed(
    search: _Search, devices: Sequence[Device], setting: Setting, attempts: Sequence[_Attempt]
) -> _Placed | None:
    """Place by the first attempt that leaves RAM enough."""
    layout = search.layout
    costs = Costs(layout, search.machine, search.use, devices, setting=setting, tuned=search.tuned)
    kv = layout.kv_bytes(setting.n_ctx, setting.kv_type)
    weights = Weights(
        tuple(layer.dense + kv * layer.owns_kv for layer in layout.layers),
        tuple(layer.experts for layer in layout.layers),
        layout.output,
        layout.shape.shared_kv_factor,
    )
    compute = search.compute(layout, setting, tuple(devices))
    rooms = []
    for device, rates in zip(devices, costs.rates, strict=True):
        capacity = device.free - margin(device.free, DEVICE_MARGIN) - compute[device.name]
        within, without = costs.all(rates, rates), costs.all(rates, costs.host)
        entry = costs.roofline.boundary(rates).total(search.use)
        tail = costs.roofline.output(rates).total(search.use)
        rooms.append(Room(capacity, within, without, entry, tail, device.takes_experts))
    for attempt in attempts:
        runs = attempt(weights, rooms, costs)
        if runs is None:
            return None
        memories = _memories(search, devices, setting, runs, compute=compute)
        if memories[-1].free >= 0:
            return _Placed(runs, memories, costs)
    return None


def _fastest(weights: Weights, rooms: Sequence[Room], costs: Costs) -> tuple[Run, ...] | None:
    found = placement.search(weights, tuple(rooms), costs.all(costs.host, costs.host))
    return None if found is None else found.runs


def _least_ram(weights: Weights, rooms: Sequence[Room], _costs: Costs) -> tuple[Run, ...] | None:
    """Place so that RAM holds as little as possible, for where the fastest does not fit it."""
    n_layer = len(weights.fixed)
    in_ram = tuple(map(float, weights.experts))
    none = (0.0,) * n_layer
    by_bytes = tuple(Room(room.capacity, none, in_ram, takes_experts=room.takes_experts) for room in rooms)
    all_of_it = tuple(float(fixed + experts) for fixed, experts in zip(weights.fixed, weights.experts, strict=True))
    found = placement.search(weights, by_bytes, all_of_it)
    return None if found is None else found.runs


def _memories(
    search: _Search, devices: Sequence[Device], setting: Setting, runs: Sequence[Run], *, compute: Mapping[str, int]
) -> tuple[Memory, ...]:
    """Add up what lies where, RAM last."""
    layout = search.layout
    layers, kv = layout.layers, layout.kv_bytes(setting.n_ctx, setting.kv_type)
    found = [
        Memory(
            device.name,
            device.description,
            device.free,
            margin(device.free, DEVICE_MARGIN),
            layers=sum(layer.dense for layer in layers[run.first : run.last]),
            experts=sum(layers[index].experts for index in run.experts),
            output=layout.output if run.last == len(layers) else 0,
            kv=kv * sum(layer.owns_kv for layer in layers[run.first : run.last]),
            compute=compute[device.name],
        )
        for device, run in zip(devices, runs, strict=True)
    ]
    shared = sum(memory.used for memory, device in zip(found, devices, strict=True) if device.kind == "igpu")
    return (*found, _ram(search, setting, runs, shared, compute[RAM]))


def _ram(search: _Search, setting: Setting, runs: Sequence[Run], shared: int, compute: int) -> Memory:
    """Add up what lies in RAM. shared: bytes of it that an integrated GPU has taken."""
    layout, usable = search.layout, search.machine.ram_usable
    with_experts = {index for run in runs for index in run.experts}
    own = layout.layers[: runs[0].first] if runs else layout.layers
    return Memory(
        RAM,
        "",
        usable - shared,
        margin(usable, RAM_MARGIN),
        layers=sum(layer.dense for layer in own),
        experts=sum(layer.experts for index, layer in enumerate(layout.layers) if index not in with_experts),
        output=0 if runs else _host_output(layout, setting),
        embedding=layout.embedding,
        kv=layout.kv_bytes(setting.n_ctx, setting.kv_type) * sum(layer.owns_kv for layer in own),
        compute=compute,
        process=PROCESS_BYTES,
    )


def _host_output(layout: Layout, setting: Setting) -> int:
    """Bytes of the output matrix in RAM: tied embeddings serve as both, but not where they may be repacked for it."""
    return layout.output if setting.repack or not layout.is_tied else layout.output - layout.embedding


def _finished(search: _Search, devices: Sequence[Device], setting: Setting, placed: _Placed) -> tuple[float, Plan]:
    """Make the plan and its score."""
    ram = placed.memories[-1]
    cache = 0 if search.wish.whole_prompts else min(ram.free // MIB, CACHE_RAM_MIB)
    setting = replace(setting, load=_load(search.wish, devices, setting, ram), cache_ram=cache)
    time = placed.costs.total(placed.runs)
    plan = Plan(
        search.layout,
        search.machine,
        search.wish,
        setting,
        tuple(devices),
        placed.runs,
        placed.memories,
        speeds(placed.costs, placed.runs, devices, time),
        search.tuned,
    )
    worth = KV_WORTH if devices else KV_WORTH_HOST
    return time.total(search.use) * worth.get(setting.kv_type, 1.0), plan


def _load(wish: Wish, devices: Sequence[Device], setting: Setting, ram: Memory) -> LoadMode:
    """Choose how the file comes into memory.

    Weights that a GPU fetches from RAM must lie in memory that it can read by itself, which a mapped file is not, and
    must not be evicted. Without a GPU a mapping starts at once; it is locked where the system allows that, but
    repacked weights are copies.
    """
    if stream_device(devices) is not None and (ram.experts or ram.layers):
        return "none"
    locks = not devices and not setting.repack and wish.lockable >= ram.used
    return "mmap+mlock" if locks else "mmap"
