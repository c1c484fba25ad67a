"""Which experts the text reached: tokens by layer and expert, and what they say about the router's balance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from hymoe.errors import ModelFileError
from hymoe.imatrix.files import Imatrix, write_text

if TYPE_CHECKING:
    from rich.table import Table

# The relative error of a mean of n squares of normal values is sqrt(2/n): 12 % here, less than the step of a type.
FLOOR: Final = 128
REPAIRED: Final = "hymoe.imatrix.repaired"
USAGE_FORMAT: Final = "hymoe expert usage"

_EXPERTS: Final = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)_exps\.weight")
_DENSE: Final = re.compile(r"blk\.(\d+)\.(?:attn_q|attn_output|attn_qkv|ffn_gate_inp)\.weight")


@dataclass(frozen=True)
class Layer:
    """A layer's usage: tokens that it saw, and those of each expert [n_expert]."""

    index: int
    n_tokens: int
    counts: NDArray[np.int64]

    @property
    def n_used(self) -> int:
        """Give the number of experts that a token gets."""
        return max(1, round(int(self.counts.sum()) / self.n_tokens)) if self.n_tokens else 1

    @property
    def gini(self) -> float:
        """Inequality of the experts' usage: 0 where all are used alike, towards 1 where one has everything."""
        ordered = np.sort(self.counts)
        total, n = int(ordered.sum()), len(ordered)
        return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total)) if total else 0.0

    def top_share(self, n: int) -> float:
        """Share of the usage that the n busiest experts have."""
        total = int(self.counts.sum())
        return float(np.sort(self.counts)[::-1][:n].sum() / total) if total else 0.0

    def below(self, floor: int) -> list[int]:
        """Give the experts that met fewer than `floor` tokens."""
        return np.flatnonzero(self.counts < floor).tolist()


def layers(imatrix: Imatrix) -> list[Layer]:
    """Give the usage of every layer with experts; in a repaired file as it was before the repair.

    Raises ModelFileError for a file that does not tell: a `.dat`, or one without experts.
    """
    fix = "collect a GGUF file with hy-imatrix collect"
    if imatrix.legacy:
        raise ModelFileError(f"{imatrix.name}: a .dat file has no counts of single experts", fix=fix)
    dense = {int(found[1]): int(entry.counts.max()) for name, entry in imatrix.entries.items()
             if (found := _DENSE.fullmatch(name))}  # fmt: skip
    counts: dict[int, NDArray[np.int64]] = {}
    before = repaired(imatrix)
    for name, entry in imatrix.entries.items():
        if (found := _EXPERTS.fullmatch(name)) and len(entry.counts) > 1:
            own = entry.counts.copy()
            for expert, n_tokens in before.get(name, {}).items():
                own[expert] = n_tokens
            counts.setdefault(int(found[1]), own)
    if not counts:
        raise ModelFileError(f"{imatrix.name}: no counts of single experts", fix=fix)
    return [Layer(index, dense.get(index, 0), counts[index]) for index in sorted(counts)]


def repaired(imatrix: Imatrix) -> dict[str, dict[int, int]]:
    """Give what a repair filled: tensor -> expert -> tokens that it had before."""
    found: dict[str, dict[int, int]] = {}
    lines = imatrix.notes.get(REPAIRED, ())
    for line in lines if isinstance(lines, list | tuple) else ():
        name, _, rest = str(line).partition(" ")
        try:
            experts = {int(expert): int(n) for expert, _, n in (pair.partition(":") for pair in rest.split())}
        except ValueError as exc:
            raise ModelFileError(f"{imatrix.name}: {REPAIRED}", got=repr(line), expected="pairs expert:tokens") from exc
        if name not in imatrix.entries or max(experts, default=0) >= len(imatrix.entries[name].counts):
            raise ModelFileError(f"{imatrix.name}: {REPAIRED}", got=repr(line), expected="experts of this file")
        found[name] = experts
    return found


def repaired_note(before: Mapping[str, Mapping[int, int]]) -> list[str]:
    """Write what a repair filled as `repaired` reads it."""
    return [" ".join([name, *(f"{expert}:{n}" for expert, n in experts.items())]) for name, experts in before.items()]


def table(found: list[Layer], floor: int, n_top: int | None) -> Table:
    """Give a row for each layer."""
    from rich.table import Table

    n = n_top or found[0].n_used
    rows = Table(box=None, pad_edge=False)
    for name in ("layer", "tokens", "least", "median", "most", "gini", f"top {n}", f"below {floor}"):
        rows.add_column(name, justify="right")
    for layer in found:
        counts = layer.counts
        numbers = (layer.index, layer.n_tokens, int(counts.min()), int(np.median(counts)), int(counts.max()))
        shares = (f"{layer.gini:.2f}", f"{100 * layer.top_share(n):.0f} %")
        rows.add_row(*map(str, numbers), *shares, f"{len(layer.below(floor))} of {len(counts)}")
    return rows


def summary(imatrix: Imatrix, floor: int, n_top: int | None) -> dict[str, Any]:
    """Give all of `show` as JSON values."""
    return {
        "file": imatrix.name,
        "datasets": list(imatrix.datasets),
        "tokens": imatrix.n_chunks * imatrix.chunk_size,
        "floor": floor,
        "repaired": {name: sorted(experts) for name, experts in repaired(imatrix).items()},
        "layers": [
            {
                "layer": layer.index,
                "tokens": layer.n_tokens,
                "counts": layer.counts.tolist(),
                "gini": layer.gini,
                "top": n_top or layer.n_used,
                "top_share": layer.top_share(n_top or layer.n_used),
                "below_floor": layer.below(floor),
            }
            for layer in layers(imatrix)
        ],
    }


def write_usage(path: Path, imatrix: Imatrix) -> None:
    """Export usage for placement: for each layer the share of tokens that use each expert, [n_expert] in 0..1."""
    found = layers(imatrix)
    content = {
        "format": USAGE_FORMAT,
        "version": 1,
        "model": imatrix.notes.get("hymoe.imatrix.model", ""),
        "n_expert_used": found[0].n_used,
        "layers": [
            {
                "layer": layer.index,
                "tokens": layer.n_tokens,
                "usage": (layer.counts / max(layer.n_tokens, 1)).round(6).tolist(),
            }
            for layer in found
        ],
    }
    write_text(path, json.dumps(content) + "\n")
