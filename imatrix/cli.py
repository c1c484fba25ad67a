"""`hy-imatrix`: collect importance, look at it, fill its gaps, convert its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hymoe import console
from hymoe.errors import ModelFileError
from hymoe.imatrix.quality_cli import quality
from hymoe.imatrix.recipe_cli import recipe

if TYPE_CHECKING:
    from hymoe.imatrix.files import Imatrix

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)

# coverage.FLOOR and repair.CHUNKS: --help comes without numpy.
FLOOR, CHUNKS = 128, 16

File = Annotated[Path, typer.Argument(metavar="FILE", help="An importance file: GGUF, or the older .dat.")]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="The model; for a split one its first part.")]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Your own text instead of hymoe's calibration set: a .jsonl holds a conversation a line (a list of "
        "messages, or an object with messages and tools), anything else is plain text. May be given more than once.",
    ),
]
Ctx = Annotated[int, typer.Option(min=32, help="Tokens of a chunk; each is computed by itself.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; the engine chooses by default.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin again instead of continuing an interrupted run.")]
EngineArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- LLAMA-IMATRIX-ARGUMENT", help="Passed on as they are, such as -ngl 99."),
]
Floor = Annotated[int, typer.Option(min=1, help="Experts that met fewer tokens count as under-covered.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="What the engine says, too.")]


@app.callback()
def about() -> None:
    """What each column of a model's matrices is worth: measured on text, for hy-convert --imatrix."""


def collect(
    model: ModelPath,
    engine_arguments: EngineArguments = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="Where to write; .dat makes the older form.")
    ] = Path("imatrix.gguf"),
    text: Text = None,
    ctx: Ctx = 512,
    chunks: Annotated[int | None, typer.Option(min=1, help="Only so many chunks.", show_default="all")] = None,
    threads: Threads = None,
    no_template: Annotated[
        bool, typer.Option("--no-template", help="Feed --text as it is, not as conversations in the model's template.")
    ] = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Collect importance from MODEL.gguf (BF16, or Q8_0 to be quick) on text in its own chat template.

    Plain text becomes conversations: of each passage the first quarter is the user's, the rest the answer. Ctrl-C
    keeps what was collected, and the same command goes on.
    """
    from hymoe.imatrix import collect as collecting

    console.set_verbosity(quiet=quiet, verbose=verbose)
    options = collecting.CollectOptions(
        model=model,
        out=out,
        text=tuple(text or ()),
        n_ctx=ctx,
        n_chunks=chunks,
        threads=threads,
        use_template=not no_template,
        overwrite=overwrite,
        restart=restart,
        extra=tuple(engine_arguments or ()),
    )
    imatrix = collecting.collect(options)
    console.status(f"{out}: {imatrix.n_chunks * imatrix.chunk_size} tokens, {len(imatrix.entries)} matrices")
    _warn_of_lost_counts(out, imatrix)
    _say_coverage(imatrix)


def show(
    file: File,
    floor: Floor = FLOOR,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="How many of the busiest experts to sum up.", show_default="as many as a token gets"),
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the heatmap as a picture, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
    usage: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Export the experts' usage as JSON, for placement.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Show which experts the text reached: tokens, balance and gaps of every layer."""
    import json

    from hymoe.imatrix import coverage, files, heatmap

    console.set_verbosity(quiet=quiet)
    imatrix = files.read(file)
    layers = coverage.layers(imatrix)
    if as_json:
        console.result(json.dumps(coverage.summary(imatrix, floor, top)))
    else:
        console.table(coverage.table(layers, floor, top), whole=True)
        console.table(heatmap.in_terminal(layers, floor), whole=True)
        _say_coverage(imatrix, floor)
    if png:
        heatmap.write_png(png, layers, floor, f"{imatrix.name}: tokens by layer and expert")
        console.status(f"{png}: the heatmap")
    if usage:
        coverage.write_usage(usage, imatrix)
        console.status(f"{usage}: usage of {sum(len(layer.counts) for layer in layers)} experts")


def repair(
    file: File,
    model: Annotated[Path, typer.Option(metavar="MODEL.gguf", help="The model; any type of it will do.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Where to write the repaired file.")],
    engine_arguments: EngineArguments = None,
    text: Text = None,
    floor: Floor = FLOOR,
    ctx: Ctx = 512,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of the pass in which every expert computes.")] = CHUNKS,
    threads: Threads = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="TRUE", help="An importance file of other text: print how well the repair predicts it."),
    ] = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fill the importance of experts that the text hardly reached.

    They are estimated from what the layer's tokens say and from a pass in which every expert computes, and mixed with
    what the expert saw itself. Experts with enough tokens stay as they are; the file says what was filled.
    """
    from hymoe.imatrix import files
    from hymoe.imatrix import repair as repairing
    from hymoe.imatrix.coverage import repaired

    console.set_verbosity(quiet=quiet, verbose=verbose)
    true = files.read(against) if against else None
    options = repairing.RepairOptions(
        imatrix=file,
        model=model,
        out=out,
        floor=floor,
        text=tuple(text or ()),
        n_ctx=ctx,
        n_chunks=chunks,
        threads=threads,
        overwrite=overwrite,
        restart=restart,
        extra=tuple(engine_arguments or ()),
    )
    imatrix = repairing.repair(options)
    filled = repaired(imatrix)
    console.status(f"{out}: {sum(map(len, filled.values()))} experts' matrices filled, in {len(filled)} tensors")
    _warn_of_lost_counts(out, imatrix)
    if true:
        console.table(repairing.table(repairing.agreement(imatrix, true, floor)), whole=True)


def convert(
    source: File,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write; .dat makes the older form, else GGUF.")],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Convert between the GGUF and the .dat form, which other tools need."""
    from hymoe.imatrix import files
    from hymoe.imatrix.collect import check_output

    console.set_verbosity(quiet=quiet)
    check_output(out, overwrite=overwrite)
    imatrix = files.read(source)
    files.save(out, imatrix)
    console.status(f"{out}: {len(imatrix.entries)} matrices")
    _warn_of_lost_counts(out, imatrix)


# Commands of other files join the table.
COMMANDS = (collect, show, repair, convert, recipe, quality)
for command in COMMANDS:
    app.command()(command)


def _warn_of_lost_counts(out: Path, imatrix: Imatrix) -> None:
    from hymoe.imatrix.files import LEGACY_SUFFIX

    if out.suffix == LEGACY_SUFFIX and not imatrix.legacy:
        n_empty = sum(map(imatrix.n_empty, imatrix.entries))
        lost = f", and {n_empty} experts without data are all ones in it" if n_empty else ""
        console.warn(f"{out.name}: a .dat cannot hold the counts of single experts{lost}")


def _say_coverage(imatrix: Imatrix, floor: int = FLOOR) -> None:
    from hymoe.imatrix.coverage import layers, repaired

    try:
        found = layers(imatrix)
    except ModelFileError:
        return
    n_below, n_all = sum(len(layer.below(floor)) for layer in found), sum(len(layer.counts) for layer in found)
    what_then = "the file was repaired" if repaired(imatrix) else "hy-imatrix repair fills them"
    if n_below:
        console.status(f"{n_below} of {n_all} experts met fewer than {floor} tokens: {what_then}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status."""
    return console.run(app, argv, "hy-imatrix")
