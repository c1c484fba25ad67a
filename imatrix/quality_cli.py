"""`hy-imatrix quality`: what a quantization lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hymoe import console
from hymoe.errors import OutputError


def quality(
    reference: Annotated[Path, typer.Argument(metavar="REF.gguf", help="The model in full precision, or as Q8_0.")],
    quantized: Annotated[list[Path], typer.Argument(metavar="QUANT.gguf...", help="Quantizations of it.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Your own text instead of hymoe's held-out conversations: a .jsonl of conversations, or plain text. "
            "It should be none that the importance was collected on.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=256, help="At most so many tokens of it.")] = 4096,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all processors")] = None,
    perplexity: Annotated[
        bool,
        typer.Option(
            "--perplexity",
            help="Also the perplexity of the text: for Pretrain models. An Instruct model's on plain text is in the "
            "hundreds and can fall where the model gets worse.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="OUT.svg", help="Draw bits per weight against mean KL.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where the reference's logits lie meanwhile.", show_default="the system's own"
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More detail.")] = False,
) -> None:
    """Compare quantizations with the full-precision model, token by token.

    Prints for each file the Kullback-Leibler divergence of its predictions from the reference's, in nats per token
    (mean with its standard error, 99th percentile, maximum), and how often both have the same first choice. The text
    is rendered in the model's template. Logits are compared in full precision, on the CPU.
    """
    import json

    from hymoe.imatrix.collect import check_output
    from hymoe.imatrix.files import write_text
    from hymoe.imatrix.quality import QualityOptions, measure, table
    from hymoe.imatrix.weights import n_processors

    console.set_verbosity(quiet=quiet, verbose=verbose)
    if plot is not None:
        if plot.suffix != ".svg":
            raise OutputError(f"{plot.name}", got=f"the ending {plot.suffix!r}", expected=".svg")
        check_output(plot, overwrite=True)
    options = QualityOptions(
        reference=reference,
        files=tuple(quantized),
        text=tuple(text or ()),
        n_tokens=tokens,
        n_threads=threads or n_processors(),
        folder=work,
    )
    rows = measure(options)
    if as_json:
        console.result(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        console.table(table(rows, perplexity=perplexity), whole=True)
    if plot is not None:
        from hymoe.imatrix.plot import Point, svg

        points = [Point(row.bits_per_weight, row.quality.mean, Path(row.file).stem) for row in rows]
        write_text(plot, svg({reference.stem: points}))
        console.status(f"{plot}: written")
