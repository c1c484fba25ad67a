"""Experts that the text hardly reached get importance anyway.

An expert's importance is the mean square of its inputs' columns over the tokens that the router gives it. With n tokens
it is uncertain, with none unknown. What is known without them comes from a forced pass, in which every expert computes
every token and, of a layer's tokens, those count that the router would give it first. The prior is

  down      what the expert's own inner values were in that pass: only the expert can say
  gate, up  the mean of two, since the inputs are the layer's hidden state and the same for all experts: of that state
            over all tokens (sure, but alike for all experts), and over the expert's tokens in the pass (its own, but
            tokens that it did not get)

and prior and measurement are mixed as λ and n tokens: (n·own + λ·prior) / (n + λ). λ follows from how well the prior
predicts the layer's well-covered experts (empirical Bayes): where it misses them by the relative variance τ², it is
worth as many tokens as a mean of squares of normal values needs for that variance, 2/τ².
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hymoe import __version__, console
from hymoe.errors import ModelFileError, UnsupportedError
from hymoe.imatrix import collect, files, model, passes
from hymoe.imatrix.coverage import FLOOR, REPAIRED, layers, repaired, repaired_note
from hymoe.imatrix.files import Entry, Imatrix
from hymoe.imatrix.model import Model

if TYPE_CHECKING:
    from rich.table import Table

# 16 chunks of 512 tokens give each of 64 experts (8 a token) 1024 tokens of its own.
CHUNKS: Final = 16
# Relative variance of the mean of n squares of normal values, times n.
SQUARES: Final = 2.0
LEAST_VARIANCE: Final = 1e-4

_STACK: Final = re.compile(r"(blk\.\d+\.)ffn_(gate|up|gate_up|down)_exps\.weight")
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class RepairOptions:
    """What to repair, with which model's forced pass. text, n_ctx, threads, extra: as for collecting."""

    imatrix: Path
    model: Path
    out: Path
    floor: int = FLOOR
    text: tuple[Path, ...] = ()
    n_ctx: int = 512
    n_chunks: int = CHUNKS
    threads: int | None = None
    overwrite: bool = False
    restart: bool = False
    extra: tuple[str, ...] = ()


class Agreement(NamedTuple):
    """How like the true importance an estimate is, over the repaired experts of one kind of matrix.

    cosine of the angle between the columns' importance, for the estimate and for all ones; and the correlation of the
    two, which all ones, a constant, have none of.
    """

    kind: str
    n_matrices: int
    cosine: float
    cosine_of_ones: float
    correlation: float


def repair(options: RepairOptions) -> Imatrix:
    """Fill what is under-covered and write the result; where nothing is, a copy.

    Raises ModelFileError for an imatrix of another model or without counts, and what collecting raises.
    """
    collect.check_output(options.out, overwrite=options.overwrite)
    imatrix, found = files.read(options.imatrix), model.read(options.model)
    if repaired(imatrix):
        raise UnsupportedError(f"{imatrix.name} is repaired already", fix="give the file that was collected")
    found.check(imatrix)
    if not any(layer.below(options.floor) for layer in layers(imatrix)):
        console.status(f"every expert met {options.floor} tokens or more: nothing to repair")
        files.save(options.out, imatrix)
        return imatrix
    with passes.run(_forced(options, imatrix, found), restart=options.restart) as forced:
        result = filled(imatrix, forced, options.floor)
        files.save(options.out, result)
    return result


def filled(imatrix: Imatrix, forced: Imatrix, floor: int) -> Imatrix:
    """Give the matrix with every expert of fewer than `floor` tokens estimated; the others stay bit for bit.

    forced: the sums of a forced pass of the same model. Counts stay what they were, but 1 where there were none.
    """
    entries = dict(imatrix.entries)
    before: dict[str, dict[int, int]] = {}
    for name, entry in imatrix.entries.items():
        few = np.flatnonzero(entry.counts < floor)
        if _STACK.fullmatch(name) and few.size and len(entry.counts) > 1:
            entries[name] = _mixed(entry, _prior(name, imatrix, forced), floor)
            before[name] = {int(expert): int(entry.counts[expert]) for expert in few}
    notes = {**imatrix.notes, REPAIRED: repaired_note(before), "hymoe.imatrix.repaired_by": f"hymoe {__version__}",
             "hymoe.imatrix.repaired_from": imatrix.sha256, "hymoe.imatrix.repair_floor": floor}  # fmt: skip
    return replace(imatrix, entries=entries, notes=notes)


def _forced(options: RepairOptions, imatrix: Imatrix, found: Model) -> passes.Pass:
    """The pass in which every expert computes every token, while the weights of all but the usual ones are 0."""
    text = collect.prepare(found, options.text)
    key = f"{found.architecture}.expert_used_count"
    overrides = (f"{key}=int:{found.n_expert}", f"hymoe.imatrix.n_weighted=int:{found.n_expert_used}")
    force = tuple(word for override in overrides for word in ("--override-kv", override))
    about = collect.identity(found, text, options.n_ctx, options.n_chunks, options.extra)
    return passes.Pass(
        model=options.model,
        text=text.content,
        out=options.out,
        n_ctx=options.n_ctx,
        n_chunks=options.n_chunks,
        threads=options.threads,
        extra=(*force, *options.extra),
        label="every expert",
        identity=about | {"imatrix": imatrix.sha256[:16], "job": "repair"},
    )


def _mixed(entry: Entry, prior: Matrix, floor: int) -> Entry:
    """Mix the under-covered slices with the prior [n_expert, n_per_row]."""
    counts = entry.counts.astype(np.float64)[:, None]
    sums = entry.sums.reshape(len(counts), -1)
    own = sums / np.maximum(counts, 1)
    worth = _worth(own, prior, entry.counts, floor)
    estimate = (counts * own + worth * prior) / (counts + worth)
    few = entry.counts < floor
    shown = np.maximum(entry.counts, 1)
    mixed = np.where(few[:, None], estimate * shown[:, None], sums)
    return Entry(mixed.astype(np.float32).reshape(-1), np.where(few, shown, entry.counts))


def _worth(own: Matrix, prior: Matrix, counts: NDArray[np.int64], floor: int) -> float:
    """Give λ, the number of tokens that the prior is worth; `floor` where no expert tells."""
    covered = counts >= max(floor, 2)
    if not covered.any():
        return float(floor)
    misses = ((own - prior) ** 2).sum(axis=1) / np.maximum((prior**2).sum(axis=1), np.finfo(float).tiny)
    chance = SQUARES / np.maximum(counts, 1)
    variance = float(np.mean(misses[covered] - chance[covered]))
    return SQUARES / max(variance, LEAST_VARIANCE)


def _prior(name: str, imatrix: Imatrix, forced: Imatrix) -> Matrix:
    """Give what is known without the experts' own tokens, [n_expert, n_per_row]."""
    found = _STACK.fullmatch(name)
    assert found
    n_expert = len(imatrix.entries[name].counts)
    if name not in forced.entries or (forced.entries[name].counts <= 0).any():
        raise ModelFileError(f"the forced pass gave nothing for {name}", fix="give it more text, or --chunks")
    likeliest: Matrix = forced.importance(name).reshape(n_expert, -1).astype(np.float64)
    if found[2] == "down":
        return likeliest
    both: Matrix = (likeliest + _layer_mean(name, found[1], imatrix)) / 2
    return both


def _layer_mean(name: str, layer: str, imatrix: Imatrix) -> Matrix:
    """Mean square of the layer's hidden state: what the shared expert or the router met, else all experts together."""
    for other in ("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_inp"):
        entry = imatrix.entries.get(f"{layer}{other}.weight")
        if entry is not None and entry.counts[0] > 0:
            known: Matrix = imatrix.importance(f"{layer}{other}.weight").astype(np.float64)
            return known
    sums, counts = imatrix.entries[name]
    if not counts.any():
        raise ModelFileError(f"{imatrix.name}: {name}", got="no token for any expert", fix="collect it with more text")
    total: Matrix = sums.reshape(len(counts), -1).sum(axis=0, dtype=np.float64)
    mean: Matrix = total / counts.sum()
    return mean


def agreement(estimate: Imatrix, true: Imatrix, floor: int) -> list[Agreement]:
    """Compare what a repair put in with what `true`, collected on other text, measured of the same experts.

    Only experts that `true` has `floor` tokens of take part. Raises ModelFileError for an imatrix of another model, and
    where nothing can be compared.
    """
    pairs: dict[str, list[tuple[Matrix, Matrix]]] = {}
    for name, experts in repaired(estimate).items():
        found = _STACK.fullmatch(name)
        if found:
            pairs.setdefault(found[2], []).extend(_pairs(name, experts, estimate, true, floor))
    rows = [_compared(kind, of_kind) for kind, of_kind in pairs.items() if of_kind]
    if not rows:
        raise ModelFileError(f"{true.name}: nothing to compare with", got=f"no repaired expert with {floor} tokens")
    return rows


def _pairs(
    name: str, experts: Iterable[int], estimate: Imatrix, true: Imatrix, floor: int
) -> Iterator[tuple[Matrix, Matrix]]:
    counts = estimate.entries[name].counts
    if name not in true.entries or true.entries[name].sums.size != estimate.entries[name].sums.size:
        raise ModelFileError(f"{true.name}: the importance matrix of another model", got=f"another {name}")
    guess, truth = (each.importance(name).reshape(len(counts), -1).astype(np.float64) for each in (estimate, true))
    for expert in experts:
        if true.entries[name].counts[expert] >= floor and truth[expert].any():
            yield guess[expert], truth[expert]


def _compared(kind: str, pairs: list[tuple[Matrix, Matrix]]) -> Agreement:
    def cosine(a: Matrix, b: Matrix) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    return Agreement(
        kind,
        len(pairs),
        float(np.mean([cosine(guess, truth) for guess, truth in pairs])),
        float(np.mean([cosine(np.ones_like(truth), truth) for _, truth in pairs])),
        float(
            np.mean([np.corrcoef(guess, truth)[0, 1] if guess.std() * truth.std() else 0.0 for guess, truth in pairs])
        ),
    )


def table(rows: list[Agreement]) -> Table:
    """Give a row for each kind of matrix."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for name in ("", "matrices", "cosine", "of all ones", "correlation", "of all ones"):
        shown.add_column(name, justify="right" if name else "left")
    for row in rows:
        values = (f"{value:.3f}" for value in (row.cosine, row.cosine_of_ones, row.correlation, 0.0))
        shown.add_row(row.kind, str(row.n_matrices), *values)
    return shown
