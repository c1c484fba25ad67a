"""hy-convert: a HunYuan checkpoint becomes a GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hymoe import console

if TYPE_CHECKING:
    from hymoe.convert.plan import Plan

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


class Quant(StrEnum):
    """Types that one pass can write."""

    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"
    Q8_0 = "Q8_0"


@app.command()
def convert(
    model_dir: Annotated[
        Path, typer.Argument(help="Folder of a HunYuan checkpoint (config.json, *.safetensors, hy.tiktoken).")
    ],
    out: Annotated[
        Path | None, typer.Argument(help="The GGUF file to write; not needed with --dry-run.", show_default=False)
    ] = None,
    quant: Annotated[Quant, typer.Option(help="Type of the weight matrices; norms and routers stay F32.")] = Quant.BF16,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More detail.")] = False,
) -> None:
    """Convert a HunYuan checkpoint to GGUF.

    Every name and shape is checked before the first weight is read; memory stays a few chunks, whatever the model's
    size; the file has a temporary name until it is complete.
    """
    console.set_verbosity(quiet=quiet, verbose=verbose)
    if dry_run:
        from hymoe.convert.convert import prepare

        print_plan(prepare(model_dir, quant.value).plan)
        return
    if out is None:
        raise typer.BadParameter("missing: where to write the GGUF (or pass --dry-run)", param_hint="OUT")
    from hymoe.convert.convert import ConvertOptions, convert

    size = convert(ConvertOptions(model_dir, out, quant.value, overwrite=overwrite))
    console.status(f"{out}: {console.format_bytes(size)}, {quant.value}")


def print_plan(plan: Plan) -> None:
    """Print one line per kind of tensor, then the totals, to stdout."""
    import re

    from rich.table import Table

    kinds: dict[tuple[str, ...], list[int]] = {}
    for tensor in plan.tensors:
        name = re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name)
        sources = "+".join(sorted({source.format for source in tensor.sources}))
        shape = " × ".join(map(str, tensor.shape))
        total = kinds.setdefault((name, shape, sources, tensor.qtype.name), [0, 0])
        total[0] += 1
        total[1] += tensor.n_bytes
    table = Table("tensor", "shape", "source", "type", box=None, header_style="")
    table.add_column("count", justify="right")
    table.add_column("bytes", justify="right")
    for (name, shape, source, qtype), (count, n_bytes) in kinds.items():
        table.add_row(name, shape, source, qtype, str(count), console.format_bytes(n_bytes))
    console.table(table)
    bits = 8 * plan.data_bytes / plan.n_params
    console.result(
        f"\n{plan.quant}: {len(plan.tensors)} tensors, {plan.n_params / 1e9:.3f} B weights, {bits:.2f} bits each"
    )
    console.result(f"reads {console.format_bytes(plan.source_bytes)}, writes {console.format_bytes(plan.data_bytes)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run hy-convert; gives the exit status."""
    return console.run(app, argv, "hy-convert")
