"""hy-convert: a HunYuan checkpoint becomes a GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hymoe import console
from hymoe.convert.quants import Quant

if TYPE_CHECKING:
    from hymoe.convert.verify import Tally

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


WRITING = ("quant", "imatrix", "recipe", "split_max_size", "overwrite", "restart", "keep_template")
NOT_WITH_REPAIR = ("quant", "imatrix", "recipe", "split_max_size", "restart", "revision", "keep_shards", "verify")


@app.command()
def convert(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a HunYuan checkpoint (config.json, *.safetensors, hy.tiktoken), or a repository of the "
            "Hugging Face hub: org/name or org/name@revision. With --repair a GGUF."
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(help="The GGUF file to write; not needed with --dry-run.", show_default=False)
    ] = None,
    quant: Annotated[
        Quant,
        typer.Option(
            case_sensitive=False,
            metavar="TYPE",
            help="Type of the weight matrices, by llama.cpp's names and rules; norms and routers stay F32. "
            f"One of {', '.join(Quant)}.",
        ),
    ] = Quant.BF16,
    imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Importance matrix from hy-imatrix or llama-imatrix (GGUF or .dat)."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Types for single tensors: lines of `name pattern = TYPE`; the first match wins."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the repository.", show_default="main")
    ] = None,
    keep_template: Annotated[
        bool,
        typer.Option("--keep-template", help="Carry the vendor's chat template unchanged; by default it is repaired."),
    ] = False,
    keep_shards: Annotated[
        bool, typer.Option("--keep-shards", help="Keep what is downloaded, in OUT.hub, instead of removing it.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print the plan, write nothing. Weights may be absent altogether."
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="MODEL is a Hunyuan-A13B GGUF from another tool: copy it to OUT with the metadata that hy-convert "
            "writes. The weights stay as they are.",
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare every tensor with its source and print the errors; alone and with an OUT that exists (or the "
            "first of its parts), do nothing else.",
        ),
    ] = False,
    split_max_size: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=console.parse_size,
            help="Split OUT into files of at most SIZE bytes (K, M, G: powers of 1000).",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again instead of continuing an interrupted conversion.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More detail.")] = False,
) -> None:
    """Convert a HunYuan checkpoint to GGUF.

    Every name and shape is checked before the first weight is read; memory stays a few chunks, whatever the model's
    size. From the hub comes a shard at a time, and goes again when it is consumed. The file has a temporary name
    until it is complete. What was interrupted goes on where it stopped when the same command is given again.
    """
    console.set_verbosity(quiet=quiet, verbose=verbose)
    if repair:
        _refuse_with_repair(ctx)
        _repair(Path(model), out, dry_run=dry_run, overwrite=overwrite, keep_template=keep_template)
        return
    if dry_run:
        from hymoe.convert.convert import preview
        from hymoe.convert.report import print_plan

        print_plan(preview(model, quant.value, imatrix, recipe, revision))
        return
    if out is None:
        raise _no_output()
    from hymoe.convert import convert as converter

    if verify and not _asks_for_new(ctx) and (existing := converter.finished(out)):
        print_errors(existing, converter.verify(model, existing, revision))
        return
    options = converter.ConvertOptions(
        model,
        out,
        quant.value,
        overwrite,
        imatrix,
        recipe,
        restart,
        split_max_size,
        verify=verify,
        revision=revision,
        keep_shards=keep_shards,
        keep_template=keep_template,
    )
    result = converter.convert(options)
    names = f"{out}" if len(result.files) == 1 else f"{result.files[0]} and {len(result.files) - 1} more"
    console.status(f"{names}: {console.format_bytes(result.n_bytes)}, {quant.value}")
    if result.tally:
        print_errors(result.files[0], result.tally)


def _no_output() -> typer.BadParameter:
    return typer.BadParameter("missing: where to write the GGUF (or pass --dry-run)", param_hint="OUT")


def _given(ctx: typer.Context, names: Sequence[str]) -> list[str]:
    """Give those of these parameters that stand on the command line."""
    sources = ((name, ctx.get_parameter_source(name)) for name in names)
    return [name for name, source in sources if source is not None and source.name == "COMMANDLINE"]


def _refuse_with_repair(ctx: typer.Context) -> None:
    """Raise a usage error for options that mean nothing where no checkpoint is converted."""
    if given := _given(ctx, NOT_WITH_REPAIR):
        raise typer.BadParameter(f"--{given[0].replace('_', '-')} does not go with --repair, which leaves the weights")


def _repair(source: Path, out: Path | None, *, dry_run: bool, overwrite: bool, keep_template: bool) -> None:
    """Write a GGUF of another tool again with our metadata; with `dry_run` print what would change."""
    from hymoe.convert import repair

    if out is None and not dry_run:
        raise _no_output()
    todo = repair.examine(source, keep_template=keep_template)
    if not todo.changes:
        console.status(f"{source} needs no repair: nothing to write")
        return
    for change in todo.changes:
        (console.result if dry_run else console.detail)(str(change))
    if out is not None and not dry_run:
        files = repair.write(todo, out, overwrite=overwrite)
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        console.status(f"{files[0]}{more}: {len(todo.changes)} metadata entries changed, every weight as it was")


def _asks_for_new(ctx: typer.Context) -> bool:
    """Whether an option was given that only makes sense for a file to be written."""
    return bool(_given(ctx, WRITING))


def print_errors(file: Path, tally: Tally) -> None:
    """Print what verifying found to stdout, one line per kind of tensor; raise what it found wrong."""
    console.table(tally.table())
    if tally.fault:
        raise tally.fault
    console.status(f"{file.name}: every tensor is what the checkpoint says, within its type")


def main(argv: Sequence[str] | None = None) -> int:
    """Run hy-convert; gives the exit status."""
    return console.run(app, argv, "hy-convert")
