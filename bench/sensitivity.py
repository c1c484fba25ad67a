"""Write imatrix/sensitivity.json: what errors cost, and how large they are, measured on the miniature.

Recipes for models that cannot be run here are made with it. `bench/quality.py` leaves the GGUF and the imatrix that
this takes, and most of the work done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from common import ROOT, WORK

from hymoe.imatrix import files
from hymoe.imatrix.recommend import RecipeOptions, evidence, open_weights
from hymoe.imatrix.sensitivity import kind_of, summarized

OUT = ROOT / "imatrix" / "sensitivity.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=WORK / "quality" / "BF16.gguf", help="[%(default)s]")
    parser.add_argument(
        "imatrix", type=Path, nargs="?", default=WORK / "quality" / "imatrix.gguf", help="[%(default)s]"
    )
    parser.add_argument("--origin", default="the committed miniature", help="what the table says of the model")
    options = parser.parse_args()
    imatrix = files.read(options.imatrix)
    with open_weights(options.model) as weights:
        errors, costs, _ = evidence(RecipeOptions(options.model, options.imatrix, measured=True), weights, imatrix)
        n_layer = weights.hparams["block_count"]
    origin = f"{options.origin}: {n_layer} layers, bench/sensitivity.py; imatrix sha256 {imatrix.sha256[:16]}"
    parts: dict[str, Mapping[str, object]] = {"sensitivity": summarized(costs, n_layer), "error": mean_errors(errors)}
    lines = [f'"origin": {json.dumps(origin)}']
    for name, by_kind in parts.items():
        rows = ",\n  ".join(f"{json.dumps(kind)}: {json.dumps(row)}" for kind, row in by_kind.items())
        lines.append(f'"{name}": {{\n  {rows}\n}}')
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def mean_errors(errors: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean over layers, by kind of tensor and type."""
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, by_type in errors.items():
        kinds.setdefault(kind_of(name)[0], []).append(by_type)
    return {
        kind: {name: float(f"{sum(row[name] for row in rows) / len(rows):.4g}") for name in rows[0]}
        for kind, rows in kinds.items()
    }


if __name__ == "__main__":
    main()
