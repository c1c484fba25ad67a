"""The search for placements against every placement there is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, combinations, product

import pytest

from hymoe.runtime.placement import Found, Room, Run, Weights, search, total_bytes


def every_split(n_layer: int, n_room: int, step: int) -> Iterator[list[tuple[int, int]]]:
    """Every way to give each room a run of layers, the last one ending at the end."""
    for cuts in combinations(range(0, n_layer, step), n_room):
        yield list(zip(cuts, (*cuts[1:], n_layer), strict=True))


def every_choice(first: int, last: int) -> Iterator[tuple[int, ...]]:
    layers = range(first, last)
    return chain.from_iterable(combinations(layers, count) for count in range(len(layers) + 1))


def cost(rooms: list[Room], host: list[float], runs: tuple[Run, ...]) -> float:
    total = sum(host[: runs[0].first]) + rooms[-1].tail
    for room, run in zip(rooms, runs, strict=True):
        layers = range(run.first, run.last)
        total += room.entry + sum((room.within if il in run.experts else room.without)[il] for il in layers)
    return total


def exhaustive(weights: Weights, rooms: list[Room], host: list[float]) -> float | None:
    """The least cost of all placements that fit."""
    best: float | None = None
    for split in every_split(len(host), len(rooms), weights.step):
        able = [room.takes_experts for room in rooms]
        for choices in product(
            *(every_choice(*run) if takes else [()] for run, takes in zip(split, able, strict=True))
        ):
            runs = tuple(Run(first, last, chosen) for (first, last), chosen in zip(split, choices, strict=True))
            used = total_bytes(weights, Found(0.0, runs))
            if all(n <= room.capacity for n, room in zip(used, rooms, strict=True)):
                found = cost(rooms, host, runs)
                best = found if best is None else min(best, found)
    return best


@pytest.mark.parametrize("n_room", [1, 2, 3])
@pytest.mark.parametrize("step", [1, 2])
def test_the_best_of_all_placements(n_room: int, step: int) -> None:
    rng = random.Random(n_room + 10 * step)
    found_some = 0
    for _ in range(60):
        n_layer = rng.choice([4, 6]) if n_room < 3 else 6
        weights = Weights(
            tuple(rng.randint(1, 5) for _ in range(n_layer)),
            tuple(rng.choice([6, 9, 13]) for _ in range(n_layer)),
            rng.randint(0, 6),
            step,
        )
        host = [rng.uniform(8, 20) for _ in range(n_layer)]
        rooms = []
        for _ in range(n_room):
            without = tuple(rng.uniform(4, 12) for _ in range(n_layer))
            # some layers are better off with their experts in RAM
            within = tuple(value - rng.uniform(-1, 4) for value in without)
            fees = rng.uniform(0, 2), rng.uniform(0, 2)
            rooms.append(Room(rng.randint(3, 60), within, without, *fees, takes_experts=rng.random() < 0.8))
        expected = exhaustive(weights, rooms, host)
        found = search(weights, tuple(rooms), tuple(host))
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            found_some += 1
            assert found.cost == pytest.approx(expected)
            assert cost(rooms, host, found.runs) == pytest.approx(expected)
            assert all(n <= r.capacity for n, r in zip(total_bytes(weights, found), rooms, strict=True))
    assert found_some >= 20


def test_without_rooms_all_is_the_hosts() -> None:
    assert search(Weights((1, 1), (1, 1), 1), (), (2.0, 3.0)) == Found(5.0, ())


def test_many_sizes_stay_near_the_best() -> None:
    """With a size for each layer a frontier is thinned; what is lost is less than one step of capacity."""
    rng = random.Random(3)
    sizes = tuple(rng.randint(10**9, 2 * 10**9) for _ in range(48))
    room = Room(31 * 10**9, tuple(0.0 for _ in sizes), tuple(map(float, sizes)))
    found = search(Weights((0,) * 48, sizes, 0), (room,), (1e12,) * 48)
    assert found is not None
    (n_bytes,) = total_bytes(Weights((0,) * 48, sizes, 0), found)
    assert room.capacity * 0.998 <= n_bytes <= room.capacity
