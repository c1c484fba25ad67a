"""What --dry-run prints: every kind of tensor with its formats, and what the conversion will take."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.table import Table

from hymoe import console
from hymoe.convert.convert import Conversion
from hymoe.convert.pieces import PIECE_BYTES, n_workers
from hymoe.convert.plan import Plan

# Resident bytes of the interpreter, the libraries, the plan and the vocabulary; and what a worker holds, in pieces.
BASE_BYTES = 160 << 20
PIECES_PER_WORKER = 6


def print_plan(conversion: Conversion) -> None:
    """Print one line per kind of tensor, then the totals, to stdout."""
    plan = conversion.plan
    console.table(kinds(plan))
    console.result()
    for line in totals(conversion):
        console.result(line)


def kinds(plan: Plan) -> Table:
    """Give one row per kind of tensor: name, shape, source format, type, count and bytes."""
    found: dict[tuple[str, ...], list[int]] = {}
    for tensor in plan.tensors:
        name = re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name)
        sources = "+".join(sorted({source.format for source in tensor.sources}))
        shape = " × ".join(map(str, tensor.shape))
        total = found.setdefault((name, shape, sources, tensor.qtype.name), [0, 0])
        total[0] += 1
        total[1] += tensor.n_bytes
    table = Table("tensor", "shape", "source", "type", box=None, header_style="")
    table.add_column("count", justify="right")
    table.add_column("bytes", justify="right")
    place = {name: i for i, (name, *_) in reversed([*enumerate(found)])}  # types of one kind stay together
    for (name, shape, source, qtype), (count, n_bytes) in sorted(found.items(), key=lambda item: place[item[0][0]]):
        table.add_row(name, shape, source, qtype, str(count), console.format_bytes(n_bytes))
    return table


def totals(conversion: Conversion) -> Iterator[str]:
    """Give lines about the whole: weights, bits, bytes read and written, memory, disk, and what was not looked at."""
    plan, extra = conversion.plan, conversion.checkpoint.extra_disk
    bits = 8 * plan.data_bytes / plan.n_params
    size = console.format_bytes
    yield f"{plan.quant}: {len(plan.tensors)} tensors, {plan.n_params / 1e9:.3f} B weights, {bits:.2f} bits each"
    yield f"reads  {size(plan.source_bytes)}"
    yield f"writes {size(plan.data_bytes)}, and some megabytes of metadata"
    yield f"memory {size(peak_memory())} at most"
    shards = f", {size(extra)} of it for the shards that are there at a time" if extra else ""
    yield f"disk   {size(plan.data_bytes + extra)}{shards}"
    if conversion.unseen:
        yield f"\nNot looked at, because not there: {' and '.join(conversion.unseen)}."
    if "weights" in conversion.unseen:
        yield "Names are the index's, if there is one; shapes and formats are what config.json makes one expect."


def peak_memory() -> int:
    """Resident bytes a conversion needs at most on this machine, whatever the model's size."""
    return BASE_BYTES + n_workers() * PIECES_PER_WORKER * PIECE_BYTES
