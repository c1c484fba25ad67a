"""What decides the bytes of an output, so that an interrupted one is only continued as what it was begun as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256

import hymoe
from hymoe.convert import pieces
from hymoe.convert.architectures import Key
from hymoe.convert.journal import Identity
from hymoe.convert.plan import Plan, PlannedTensor
from hymoe.convert.weights import ENCODE


def identify(plan: Plan, keys: Iterable[Key], inputs: Mapping[str, str], *, split_max_bytes: int | None) -> Identity:
    """Give everything that decides the output, in the groups of journal.DIFFERENCES.

    inputs: what tells the content of every file with weights from any other, by name.
    """
    values = {key.key: key.value for key in keys}
    options = {
        "--quant": plan.quant,
        "--imatrix": str(values.get("hymoe.imatrix.sha256", "none"))[:16],
        "--recipe": str(values.get("hymoe.recipe.sha256", "none"))[:16],
        "--split-max-size": str(split_max_bytes or "none"),
        "version of hymoe": hymoe.__version__,
        "engine": _engine(plan),
        "size of pieces": str(pieces.PIECE_BYTES),
    }
    return {
        "option": options,
        "input": inputs,
        "metadata": {name: _hash(value) for name, value in values.items()},
        "tensor": {tensor.name: _hash(_layout(tensor)) for tensor in plan.tensors},
    }


def _engine(plan: Plan) -> str:
    """Name the engine whose quantizer makes some of the bytes."""
    if all(tensor.qtype in ENCODE for tensor in plan.tensors):
        return "none"
    from hymoe.engine.installed import find

    return str(find().bin)


def _layout(tensor: PlannedTensor) -> object:
    sources = [(ref.file.name, ref.offset, ref.dtype, ref.shape) for each in tensor.sources for ref in each.refs]
    return tensor.shape, tensor.qtype.name, sources


def _hash(value: object) -> str:
    return sha256(repr(value).encode()).hexdigest()[:16]
