"""The arithmetic of a repair; what it is worth on a model is in test_collect.py."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hymoe.errors import ModelFileError
from hymoe.imatrix import coverage, repair
from hymoe.imatrix.files import Entry, Imatrix

N_EXPERT, N_ROW, FLOOR = 32, 64, 100
GATE, DOWN = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight"
Matrix = NDArray[np.float64]


def sampled(true: Matrix, counts: NDArray[np.int64], rng: np.random.Generator) -> Entry:
    """Sums of squares of normal values whose variances are `true` [n_expert, n_row]."""
    return Entry((true * rng.chisquare(np.maximum(counts, 1)[:, None], true.shape)).astype(np.float32).reshape(-1) *
                 np.repeat(counts > 0, N_ROW), counts)  # fmt: skip


def world(spread: float, seed: int = 0) -> tuple[Matrix, Imatrix, Imatrix]:
    """Experts that differ from a common shape by `spread`; half of them hardly covered. True, measured, forced."""
    rng = np.random.default_rng(seed)
    shape = rng.lognormal(0, 1, N_ROW)
    true = shape * np.exp(spread * rng.standard_normal((N_EXPERT, N_ROW)))
    counts = np.where(np.arange(N_EXPERT) % 2, 2000, rng.integers(0, 12, N_EXPERT)).astype(np.int64)
    shared = Entry((shape * 5000).astype(np.float32), np.array([5000]))
    measured = {"blk.0.ffn_gate_shexp.weight": shared}
    measured |= {name: sampled(true, counts, rng) for name in (GATE, DOWN)}
    # a forced pass sees the common shape only
    everywhere = np.full(N_EXPERT, 5000)
    forced = {name: sampled(np.tile(shape, (N_EXPERT, 1)), everywhere, rng) for name in (GATE, DOWN)}
    return true, Imatrix("m", measured, ("t",), 10, 500), Imatrix("f", forced, ("t",), 10, 500)


def error(estimate: NDArray[np.float32], true: Matrix, rows: NDArray[np.bool_]) -> float:
    """Squared error of the columns' importance, relative."""
    guess = estimate.reshape(true.shape)
    return float((((guess - true) / true)[rows] ** 2).mean())


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("name", [GATE, DOWN])
def test_the_mixture_beats_both_of_its_parts(spread: float, name: str) -> None:
    true, measured, forced = world(spread)
    few = measured.entries[name].counts < FLOOR
    after = repair.filled(measured, forced, FLOOR)
    mixed = error(after.importance(name), true, few)
    assert mixed < 1.1 * error(forced.importance(name), true, few)
    assert mixed < 1.1 * error(measured.importance(name), true, few)
    assert mixed < 0.5 * error(np.ones_like(measured.importance(name)), true, few)


def test_what_a_prior_is_worth_follows_from_how_well_it_predicts() -> None:
    worth = []
    for spread in (0.02, 0.3, 1.0):
        _, measured, forced = world(spread)
        entry = measured.entries[DOWN]
        own = measured.importance(DOWN).reshape(N_EXPERT, -1).astype(float)
        prior = forced.importance(DOWN).reshape(N_EXPERT, -1).astype(float)
        worth.append(repair._worth(own, prior, entry.counts, FLOOR))
    assert worth[0] > 10 * worth[1] > 20 * worth[2]


def test_what_is_covered_stays_bit_for_bit_and_the_rest_is_written_down() -> None:
    _, measured, forced = world(0.3)
    after = repair.filled(measured, forced, FLOOR)
    few = measured.entries[DOWN].counts < FLOOR
    for name in (GATE, DOWN):
        was, now = (each.entries[name].sums.reshape(N_EXPERT, -1) for each in (measured, after))
        np.testing.assert_array_equal(now[~few], was[~few])
        assert (now[few] != was[few]).any(axis=1).all()
        assert after.n_empty(name) == 0
        counts = measured.entries[name].counts
        assert after.entries[name].counts.tolist() == np.maximum(counts, 1).tolist()
        wanted = {int(expert): int(counts[expert]) for expert in np.flatnonzero(few)}
        assert coverage.repaired(after)[name] == wanted
    assert after.entries["blk.0.ffn_gate_shexp.weight"] is measured.entries["blk.0.ffn_gate_shexp.weight"]


def test_without_a_covered_expert_the_prior_is_worth_the_floor() -> None:
    own = np.ones((2, 4))
    assert repair._worth(own, own, np.array([3, 0]), 50) == 50


def test_a_forced_pass_that_lacks_an_expert_is_refused() -> None:
    _, measured, forced = world(0.3)
    counts = forced.entries[DOWN].counts.copy()
    counts[3] = 0
    broken = Imatrix("f", {**forced.entries, DOWN: Entry(forced.entries[DOWN].sums, counts)})
    with pytest.raises(ModelFileError, match=f"gave nothing for {DOWN}"):
        repair.filled(measured, broken, FLOOR)


def test_agreement_of_the_truth_with_itself() -> None:
    true, measured, forced = world(0.3)
    after = repair.filled(measured, forced, FLOOR)
    counts = np.full(N_EXPERT, FLOOR)
    entries = {name: Entry((true * FLOOR).astype(np.float32).reshape(-1), counts) for name in (GATE, DOWN)}
    exact = Imatrix("e", entries, ("t",), 1, 1, notes=after.notes)
    for row in repair.agreement(exact, exact, FLOOR):
        assert (row.cosine, row.correlation) == pytest.approx((1, 1))
        assert row.cosine_of_ones < 0.9
    worse = repair.agreement(after, exact, FLOOR)
    assert all(row.cosine_of_ones < row.cosine < 1 for row in worse)
    with pytest.raises(ModelFileError, match="nothing to compare with"):
        repair.agreement(after, exact, FLOOR + 1)
