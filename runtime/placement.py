"""Which layers and which layers' experts go to which device: the exact search.

Layers go to devices as llama.cpp can split them: in order, each device a run of them, and those in front that no
device takes stay with the host. Of its layers a device holds attention, shared expert, router, norms and cache; their
experts are on the device or in RAM, a layer's gate, up and down always together, since apart they would cross as often
as if all were in RAM.

For every device and every run of layers the best choice of experts is found (a knapsack, solved by its frontier of
bytes and gain), and the best sequence of runs by dynamic programming over the layers. Both are exact: more memory
never makes the best worse.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

# Beyond so many, points of a frontier are joined in steps of capacity; only files with a type for each layer get there.
MAX_POINTS: Final = 2048


@dataclass(frozen=True)
class Room:
    """What a device offers: bytes for weights and cache, and what each layer costs there (any unit, less is better).

    within: cost of a layer with its experts on the device; without: with its experts in RAM. entry: cost of using the
    device at all; tail: of the output matrix, if it is the last. takes_experts: else they are never there.
    """

    capacity: int
    within: tuple[float, ...]
    without: tuple[float, ...]
    entry: float = 0.0
    tail: float = 0.0
    takes_experts: bool = True


@dataclass(frozen=True)
class Weights:
    """Bytes of each layer: what goes where its attention goes, and its experts; and of the output matrix.

    step: a device's run of layers begins at a multiple of it.
    """

    fixed: tuple[int, ...]
    experts: tuple[int, ...]
    output: int
    step: int = 1


class Run(NamedTuple):
    """Layers from `first` up to `last`, not included, on one device, and which of them have their experts there."""

    first: int
    last: int
    experts: tuple[int, ...]


class Found(NamedTuple):
    """A placement: one run for each room, in order. Layers in front of the first are the host's."""

    cost: float
    runs: tuple[Run, ...]


class _Point(NamedTuple):
    """A choice of experts: their bytes, what they gain, and which they are, as bits."""

    n_bytes: int
    gain: float
    chosen: int


class _Step(NamedTuple):
    cost: float
    runs: tuple[tuple[int, int, int], ...]  # first, last, chosen


@lru_cache(maxsize=512)  # a search goes on with some buffers corrected: most rooms come again
def search(weights: Weights, rooms: tuple[Room, ...], host: tuple[float, ...]) -> Found | None:
    """Place the layers so that the sum of costs is least; None where they cannot be placed so.

    Every room is used. host: cost of each layer with all of it in RAM.
    """
    n_layer = len(weights.fixed)
    best: dict[int, _Step] = {0: _Step(0.0, ())}
    total = 0.0
    for index, cost in enumerate(host, 1):
        total += cost
        best[index] = _Step(total, ())
    for number, room in enumerate(rooms):
        is_last = number == len(rooms) - 1
        ends = [n_layer] if is_last else range(1, n_layer)
        best = {end: step for end in ends if (step := _best(weights, room, best, end, is_last=is_last))}
    found = best.get(n_layer)
    if found is None:
        return None
    runs = (Run(first, last, tuple(_bits(chosen))) for first, last, chosen in found.runs)
    return Found(found.cost, tuple(runs))


def _best(weights: Weights, room: Room, before: dict[int, _Step], end: int, *, is_last: bool) -> _Step | None:
    """Find the best way to have the layers up to `end` placed, a run that ends there being in this room."""
    if end % weights.step and not is_last:
        return None
    found: _Step | None = None
    left = room.capacity - (weights.output if is_last else 0)
    cost = room.entry + (room.tail if is_last else 0.0)
    frontier = [_Point(0, 0.0, 0)]
    for first in range(end - 1, -1, -1):
        left -= weights.fixed[first]
        if left < 0:
            break
        cost += room.without[first]
        gain = room.without[first] - room.within[first] if room.takes_experts else 0.0
        item = _Point(weights.experts[first], gain, 1 << first)
        frontier = _extended(frontier, item, left)
        if first % weights.step or first not in before:
            continue
        gained = frontier[-1]
        total = before[first].cost + cost - gained.gain
        if found is None or total < found.cost:
            found = _Step(total, (*before[first].runs, (first, end, gained.chosen)))
    return found


def _extended(frontier: list[_Point], item: _Point, capacity: int) -> list[_Point]:
    """Add an item to a frontier of points in ascending bytes and gain, none larger than `capacity`."""
    fitting = frontier[: bisect_right(frontier, capacity, key=lambda point: point.n_bytes)]
    if item.gain <= 0:
        return fitting
    taken = [
        _Point(point.n_bytes + item.n_bytes, point.gain + item.gain, point.chosen | item.chosen)
        for point in fitting
        if point.n_bytes + item.n_bytes <= capacity
    ]
    result: list[_Point] = []
    for point in sorted([*fitting, *taken], key=lambda point: (point.n_bytes, -point.gain)):
        if not result or point.gain > result[-1].gain:
            result.append(point)
    return result if len(result) <= MAX_POINTS else _thinned(result, capacity)


def _thinned(frontier: list[_Point], capacity: int) -> list[_Point]:
    """Keep the best point of each step of capacity, and the first."""
    grain = max(capacity // MAX_POINTS, 1) * 2
    kept = {point.n_bytes // grain: point for point in frontier}
    return [frontier[0], *(point for point in kept.values() if point.n_bytes)]


def _bits(chosen: int) -> Iterator[int]:
    return (index for index in range(chosen.bit_length()) if chosen >> index & 1)


def total_bytes(weights: Weights, found: Found) -> Iterator[int]:
    """Give the bytes of weights and cache on each device, in order."""
    for number, run in enumerate(found.runs):
        output = weights.output if number == len(found.runs) - 1 else 0
        yield output + sum(weights.fixed[run.first : run.last]) + sum(weights.experts[i] for i in run.experts)
