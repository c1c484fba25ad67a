"""What an error costs, measured: KL divergence per unit of a tensor's relative output error.

One tensor at a time is exchanged for itself after a coarse type, in the loaded model, and the divergence from the
intact one is taken on a templated text. For errors that are not large it grows in proportion, so that one
measurement per tensor tells for all types. What cannot be run here gets the table that was measured on the
miniature, by kind of tensor and relative depth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from gguf import GGMLQuantizationType

from hymoe.errors import ModelFileError
from hymoe.imatrix.distortion import Errors, importance_of, is_possible, requantized, to_bf16, usage_of
from hymoe.imatrix.divergence import Reference, Tally
from hymoe.imatrix.files import Imatrix
from hymoe.imatrix.weights import Bytes, Floats, GgufWeights, Tensor

if TYPE_CHECKING:
    from hymoe.engine.evaluator import Evaluator

# Coarse enough to stand out of rounding, fine enough to be in proportion; the later ones for narrower rows.
PROBES: Final = tuple(GGMLQuantizationType[name] for name in ("Q3_K", "Q4_0", "F16"))
LAYER: Final = re.compile(r"blk\.(\d+)\.(.+)")
TABLE: Final = "sensitivity.json"

Sensitivities = dict[str, float]
"""KL in nats per token and unit of relative squared output error, by tensor."""


def measure(
    model: Evaluator,
    weights: GgufWeights,
    names: Sequence[str],
    reference: Reference,
    *,
    imatrix: Imatrix | None,
    tick: Callable[[float], None],
) -> Sensitivities:
    """Measure each tensor of a loaded model, of which `reference` is recorded. `tick` counts tokens."""
    importance = importance_of(imatrix, weights.tensors)
    found = {}
    for name in names:
        weight = importance.get(name)
        n_per_row = weights.tensors[name].shape[-1]
        probe = next(qtype for qtype in PROBES if is_possible(qtype, n_per_row, weight is not None))
        intact, changed, error = _exchanged(weights, name, probe, weight, imatrix)
        tally = Tally()
        model.set_weight(name, changed)
        for n in reference.compare(model, tally, name):
            tick(n)
        model.set_weight(name, intact)
        found[name] = tally.quality().mean / error if error else 0.0
    return found


def _exchanged(
    weights: GgufWeights, name: str, probe: GGMLQuantizationType, importance: Floats | None, imatrix: Imatrix | None
) -> tuple[Bytes, Bytes, float]:
    """Give the tensor's bytes, those after the probe's type, and the relative output error, as distortion has it."""
    tensor = weights.tensors[name]
    intact, changed = [], []
    squares = energy = 0.0
    usage = usage_of(imatrix, name, tensor)
    for index in range(tensor.n_slice):
        rows = range(tensor.n_rows)
        values = weights.rows(name, index, rows)
        weight = None if importance is None else importance[index]
        other = requantized(values, probe, weight)
        intact.append(weights.stored(name, index, rows).reshape(-1))
        changed.append(_encoded(other, tensor.qtype, name))
        columns = np.ones(values.shape[1]) if weight is None else weight.astype(np.float64)
        squares += usage[index] * float(np.square(other - values, dtype=np.float64).sum(0) @ columns)
        energy += usage[index] * float(np.square(values, dtype=np.float64).sum(0) @ columns)
    return np.concatenate(intact), np.concatenate(changed), squares / energy if energy else 0.0


def _encoded(values: Floats, qtype: GGMLQuantizationType, name: str) -> Bytes:
    from hymoe.engine.bindings import quantize_rows

    if qtype.name == "BF16":
        return to_bf16(values).view(np.uint8).reshape(-1)
    if qtype.name == "F16":
        return values.astype(np.float16).view(np.uint8).reshape(-1)
    if qtype.name == "F32":
        return values.view(np.uint8).reshape(-1)
    if qtype.name == "Q8_0":
        return quantize_rows(values, qtype).reshape(-1)
    raise ModelFileError(f"{name}: a model to measure", got=qtype.name, expected="F32, F16, BF16 or Q8_0")


# -- the table --------------------------------------------------------------------------------------------------------


def kind_of(name: str) -> tuple[str, int | None]:
    """Give a tensor's kind and layer: ("ffn_down_exps", 3) for blk.3.ffn_down_exps.weight."""
    found = LAYER.fullmatch(name)
    kind = (found[2] if found else name).removesuffix(".weight")
    return kind, int(found[1]) if found else None


def summarized(found: Sensitivities, n_layer: int) -> dict[str, list[list[float]]]:
    """Sum up a measured model as [relative depth, sensitivity × layers] points by kind of tensor."""
    points: dict[str, list[list[float]]] = {}
    for name, value in found.items():
        kind, layer = kind_of(name)
        depth = 0.0 if layer is None else (layer + 0.5) / n_layer
        points.setdefault(kind, []).append(
            [round(depth, 4), float(f"{value * (n_layer if layer is not None else 1):.4g}")]
        )
    return points


def assumed(names: Sequence[str], n_layer: int, table: Mapping[str, Sequence[Sequence[float]]]) -> Sensitivities:
    """Give sensitivities of another model by the table's: interpolated by depth, shared out among its layers."""
    result = {}
    for name in names:
        kind, layer = kind_of(name)
        # Untied models have an output of their own; the table's embeddings are both.
        points = table.get(kind) or table["token_embd"]
        depths, values = zip(*points, strict=True)
        if layer is None:
            result[name] = float(values[0])
        else:
            result[name] = float(np.interp((layer + 0.5) / n_layer, depths, values)) / n_layer
    return result


def assumed_errors(names: Sequence[str], tensors: Mapping[str, Tensor], *, has_importance: bool) -> Errors:
    """Give errors of weights that are not there: those of the table's tensors of that kind, as far as rows allow."""
    table = shipped()["error"]
    result = {}
    for name in names:
        errors = table.get(kind_of(name)[0]) or table["token_embd"]
        n_per_row = tensors[name].shape[-1]
        result[name] = {
            type_name: error
            for type_name, error in errors.items()
            if is_possible(GGMLQuantizationType[type_name], n_per_row, has_importance or kind_of(name)[1] is None)
        }
    return result


def shipped() -> dict[str, Any]:
    """Give the table that comes with hymoe: `sensitivity` as `summarized` has it, `error` by kind and type."""
    found: dict[str, Any] = json.loads((files("hymoe.imatrix") / TABLE).read_text(encoding="utf-8"))
    return found
