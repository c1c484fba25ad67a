"""The optimizer against trying everything, on problems small enough for that."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from hymoe.imatrix.allocate import Choice, Item, Option, least_bytes, solve_one, solve_two

TYPES = [GGMLQuantizationType[name] for name in ("Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q2_K")]


def problem(seed: int, n_dense: int, n_layer: int) -> list[Item]:
    """Items of random sizes, larger ones of lesser loss; two stacks of experts in each layer."""
    random = np.random.default_rng(seed)

    def item(name: str, layer: int | None) -> Item:
        sizes = sorted(random.integers(5, 60, 3).tolist(), reverse=True)
        losses = np.sort(random.random(3))
        return Item(name, tuple(Option(t, b, float(e)) for t, b, e in zip(TYPES, sizes, losses, strict=False)), layer)

    experts = [item(f"e{layer}.{i}", layer) for layer in range(n_layer) for i in range(2)]
    return [*(item(f"d{i}", None) for i in range(n_dense)), *experts]


def every(items: list[Item]) -> list[tuple[Option, ...]]:
    return list(product(*(item.options for item in items)))


@pytest.mark.parametrize("seed", range(8))
def test_one_budget_gives_the_best_there_is(seed: int) -> None:
    items = problem(seed, 6, 0)
    budget = int(least_bytes(items) * 1.4)
    best = min(sum(o.loss for o in c) for c in every(items) if sum(o.n_bytes for o in c) <= budget)
    found = solve_one(items, budget)
    assert found is not None
    assert found.n_bytes <= budget
    assert found.loss == pytest.approx(best)


def two_by_force(items: list[Item], card: int, ram: int) -> float:
    layers = sorted({item.layer for item in items if item.layer is not None})
    best = np.inf
    for choice in every(items):
        loss = sum(option.loss for option in choice)
        if loss >= best:
            continue
        for n_card in range(len(layers) + 1):
            on_card = [item.layer is None or item.layer in layers[:n_card] for item in items]
            spent = [0, 0]
            for option, on in zip(choice, on_card, strict=True):
                spent[not on] += option.n_bytes
            if spent[0] <= card and spent[1] <= ram:
                best = loss
    return float(best)


@pytest.mark.parametrize("seed", range(6))
def test_two_budgets_give_the_best_there_is(seed: int) -> None:
    items = problem(seed, 2, 3)
    card, ram = 130, int(0.9 * least_bytes(items))
    best = two_by_force(items, card, ram)
    found = solve_two(items, card, ram)
    if not np.isfinite(best):
        assert found is None
        return
    assert found is not None
    assert found.loss == pytest.approx(best)
    check_places(items, found, card, ram)


def check_places(items: list[Item], found: Choice, card: int, ram: int) -> None:
    spent = [0, 0]
    for item, option in zip(items, found.options, strict=True):
        spent[item.layer is not None and item.layer >= found.n_card] += option.n_bytes
    assert spent[0] <= card
    assert spent[1] <= ram


def test_budgets_of_real_size_are_kept_and_nearly_used_up() -> None:
    """Bytes are counted in units there, rounded up; what that leaves is spent."""
    random = np.random.default_rng(3)
    bits = (8.5, 6.56, 4.5, 3.44, 2.63)
    items = []
    for number in range(100):
        size = int(random.integers(1_000_000, 400_000_000))
        options = (Option(t, int(size * b / 8), 4.0**-b * random.random()) for t, b in zip(TYPES, bits, strict=True))
        items.append(Item(f"t{number}", tuple(options)))
    for factor in (1.05, 1.5, 2.5):
        budget = int(factor * least_bytes(items))
        found = solve_one(items, budget)
        assert found is not None
        assert 0.995 * budget < found.n_bytes <= budget


def test_more_bytes_never_cost() -> None:
    items = problem(1, 6, 0)
    least = least_bytes(items)
    assert solve_one(items, least - 1) is None
    found = [solve_one(items, budget) for budget in range(least, 3 * least)]
    losses = [choice.loss for choice in found if choice is not None]
    assert len(losses) == len(found)
    assert losses == sorted(losses, reverse=True)


def test_time_has_its_price() -> None:
    """Two types of one size, the better one slow: with a price the fast one is taken, but not on the card."""
    slow, fast = Option(TYPES[0], 10, 0.1, 1.0), Option(TYPES[1], 10, 0.2, 0.1)
    items = [Item("d", (slow, fast)), *(Item(f"e{layer}", (slow, fast), layer) for layer in range(3))]
    free, dear = solve_two(items, 20, 20), solve_two(items, 20, 20, price=1.0)
    assert free is not None
    assert dear is not None
    assert free.options == (slow,) * 4
    assert (dear.n_card, dear.options) == (1, (slow, slow, fast, fast))
