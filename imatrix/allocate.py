"""The optimizer: one type per tensor, the least predicted loss, one or two memories with a budget each.

A multiple-choice knapsack, solved by dynamic programming over the bytes spent. Bytes are counted in units of a
UNITS-th of the budget, rounded up for each tensor, so that an answer never exceeds the budget; what rounding left
over is spent at the end on the single changes that gain most. With two memories the dense tensors are in the first, and
whole layers of experts in either: a pass from the front gives the best of "dense and the first k layers" for every k
and every number of bytes, one from the back that of the other layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
UNITS: Final = 8192


class Option(NamedTuple):
    """A type that a tensor may have: bytes, predicted loss, and seconds per token where it lives in RAM."""

    qtype: GGMLQuantizationType
    n_bytes: int
    loss: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Item:
    """A tensor with its options; `layer` for routed experts, which may live in either memory, else None."""

    name: str
    options: tuple[Option, ...]
    layer: int | None = None


class Choice(NamedTuple):
    """What was chosen: an option for each item, and how many layers of experts are in the first memory."""

    options: tuple[Option, ...]
    n_card: int

    @property
    def loss(self) -> float:
        """Predicted."""
        return sum(option.loss for option in self.options)

    @property
    def n_bytes(self) -> int:
        """Of all items."""
        return sum(option.n_bytes for option in self.options)


class _Pass:
    """Dynamic programming over items in order: least cost by items taken and units spent."""

    def __init__(self, items: Sequence[Item], budget: int, price: float) -> None:
        self.items = items
        self.unit = max(1, -(-budget // UNITS))
        n = budget // self.unit
        self.rows: list[Doubles] = [np.zeros(n + 1)]
        self._picked: list[NDArray[np.uint8]] = []
        for item in items:
            self._add(item, price)

    def _add(self, item: Item, price: float) -> None:
        before = self.rows[-1]
        best = np.full_like(before, np.inf)
        picked = np.zeros(len(before), np.uint8)
        for number, option in enumerate(item.options):
            n = self._units(option)
            if n >= len(before):
                continue
            cost = before[: len(before) - n] + (option.loss + price * option.seconds)
            np.copyto(picked[n:], number, where=cost < best[n:])
            np.minimum(best[n:], cost, out=best[n:])
        self.rows.append(best)
        self._picked.append(picked)

    def _units(self, option: Option) -> int:
        return -(-option.n_bytes // self.unit)

    def least(self, n_items: int) -> float:
        """Cost of the first n_items within the budget; infinite where they do not fit."""
        return float(self.rows[n_items][-1])

    def trace(self, n_items: int) -> list[Option]:
        """Give the options that reach it."""
        left, found = len(self.rows[0]) - 1, list[Option]()
        for number in reversed(range(n_items)):
            option = self.items[number].options[self._picked[number][left]]
            left -= self._units(option)
            found.append(option)
        return found[::-1]


def solve_one(items: Sequence[Item], budget: int) -> Choice | None:
    """Choose within one budget of bytes; None where it cannot be met."""
    done = _Pass(items, budget, 0.0)
    if least_bytes(items) > budget:
        return None
    fits = np.isfinite(done.least(len(items)))
    # So close to the least that rounding alone is too much: begin with the smallest.
    chosen = done.trace(len(items)) if fits else [min(item.options, key=lambda o: o.n_bytes) for item in items]
    return Choice(_spend(items, chosen, [(range(len(items)), budget)]), 0)


def solve_two(items: Sequence[Item], card: int, ram: int, *, price: float = 0.0) -> Choice | None:
    """Choose within two budgets; experts' layers from the first on are on the card, as many as is best.

    price: loss that a second per token is worth, for experts in RAM. None where the budgets cannot be met.
    """
    dense = [item for item in items if item.layer is None]
    by_layer: dict[int, list[Item]] = {}
    for item in items:
        if item.layer is not None:
            by_layer.setdefault(item.layer, []).append(item)
    groups = [by_layer[layer] for layer in sorted(by_layer)]
    experts = [item for group in groups for item in group]
    ends = [0, *accumulate(map(len, groups))]
    # On the card every type is fast.
    front, back = _Pass([*dense, *experts], card, 0.0), _Pass(experts[::-1], ram, price)
    costs = [front.least(len(dense) + n) + back.least(len(experts) - n) for n in ends]
    n_card = int(np.argmin(costs))
    if not np.isfinite(costs[n_card]):
        return None
    n = len(dense) + ends[n_card]
    chosen = front.trace(n) + back.trace(len(experts) - ends[n_card])[::-1]
    ordered = [*dense, *experts]
    places = [(range(n), card), *([(range(n, len(ordered)), ram)] if not price else [])]
    by_name = dict(zip((item.name for item in ordered), _spend(ordered, chosen, places), strict=True))
    return Choice(tuple(by_name[item.name] for item in items), n_card)


def _spend(items: Sequence[Item], chosen: Sequence[Option], places: Sequence[tuple[range, int]]) -> tuple[Option, ...]:
    """Spend what rounding left over: again and again the single change that gains most and still fits."""
    result = list(chosen)
    for numbers, budget in places:
        left = budget - sum(result[number].n_bytes for number in numbers)
        while True:
            gains = [
                (result[number].loss - option.loss, number, option)
                for number in numbers
                for option in items[number].options
                if option.n_bytes - result[number].n_bytes <= left and option.loss < result[number].loss
            ]
            if not gains:
                break
            _, number, option = max(gains, key=lambda gain: (gain[0], -gain[1]))
            left -= option.n_bytes - result[number].n_bytes
            result[number] = option
    return tuple(result)


def least_bytes(items: Sequence[Item]) -> int:
    """Bytes of the smallest choice."""
    return sum(min(option.n_bytes for option in item.options) for item in items)
