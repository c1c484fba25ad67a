"""An imatrix for a tiny model: random sums that differ by column, every expert with tokens of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hymoe.imatrix import files
from hymoe.imatrix.files import Entry, Imatrix
from hymoe.imatrix.weights import Weights, matrices


def write_imatrix(path: Path, weights: Weights, *, n_more: int = 0, also: str = "") -> Path:
    """Write one for every matrix in a layer; n_more columns than it has, and an entry for a tensor it lacks."""
    random = np.random.default_rng(5)
    entries = {}
    for name in [name for name in matrices(weights) if name.startswith("blk.")]:
        tensor = weights.tensors[name]
        counts = random.integers(20, 200, tensor.n_slice)
        columns = random.lognormal(0.0, 1.0, (tensor.n_slice, tensor.shape[-1] + n_more))
        entries[name] = Entry((columns * counts[:, None]).astype(np.float32).reshape(-1), counts)
    if also:
        entries = {also: Entry(np.ones(256, np.float32), np.array([1])), **entries}
    files.write(path, Imatrix(path.name, entries, ("random",), 1, 512))
    return path
