"""`hy-imatrix recipe`: a type for every tensor, for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hymoe import console


def recipe(
    model: Annotated[
        Path,
        typer.Argument(
            help="A GGUF in full precision or as Q8_0 (of a split one the first part), or a checkpoint folder; a "
            "folder with nothing but config.json will do for a preview."
        ),
    ],
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix of this model (GGUF or .dat).")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="CARD+RAM", help="Fill a card and the RAM beside it, such as 24G+64G (powers of 1000)."),
    ] = None,
    ctx: Annotated[int, typer.Option(min=1, help="Context in tokens, with --fit.")] = 32768,
    kv: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Keys and values, with --fit: F16 or Q8_0.", show_default="F16 if it fits"),
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=console.parse_size, help="Bytes of the file.")
    ] = None,
    bpw: Annotated[float | None, typer.Option(min=0.5, max=32, help="Bits per weight of the file.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", show_default="stdout")] = None,
    menu: Annotated[
        str | None, typer.Option(metavar="TYPES", help="Types to choose from, with commas between.")
    ] = None,
    speed_table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --fit: weights per second that the processor computes for experts in RAM (JSON, by type).",
            show_default="measured here",
        ),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="With --fit: whether speed counts.")] = True,
    min_speed: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="With --fit: tokens per second that the experts in RAM must allow. By default the least loss × time "
            "is chosen: twice the time must at least halve the loss.",
        ),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Run the model once per tensor for its sensitivity, or take the miniature's table.",
            show_default="measure up to 2 GiB",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Text to run it on, instead of our conversations.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all processors")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More detail.")] = False,
) -> None:
    """Choose a type for every tensor so that the predicted loss is least within a budget.

    The error of each type on each tensor is measured on samples of its rows; what an error costs is measured by running
    the model with one tensor changed at a time. Both are kept, so that another budget takes seconds.
    """
    from hymoe.imatrix.collect import check_output
    from hymoe.imatrix.files import write_text
    from hymoe.imatrix.recipe_text import recipe_text
    from hymoe.imatrix.recommend import MENU, RecipeOptions, recommend
    from hymoe.imatrix.weights import n_processors

    console.set_verbosity(quiet=quiet, verbose=verbose)
    if sum(budget is not None for budget in (fit, size, bpw)) != 1:
        raise typer.BadParameter("give one of --fit, --size and --bpw")
    needs_fit = {"--kv": kv, "--speed-table": speed_table, "--min-speed": min_speed}
    if fit is None and (lost := [name for name, given in needs_fit.items() if given is not None]):
        raise typer.BadParameter("is for --fit", param_hint=lost[0])
    if min_speed is not None and not speed:
        raise typer.BadParameter("is nothing with --no-speed", param_hint="--min-speed")
    if out is not None:
        check_output(out, overwrite=overwrite)
    options = RecipeOptions(
        model=model,
        imatrix=imatrix,
        size=size,
        bits=bpw,
        fit=_fit(fit) if fit else None,
        n_ctx=ctx,
        kv_type=_type(kv, ("F16", "Q8_0"), "--kv") if kv else None,
        menu=tuple(_menu(menu)) if menu else MENU,
        text=tuple(text or ()),
        measured=measure,
        n_threads=threads or n_processors(),
        weights_per_second=(_speeds(speed_table) if speed_table else None) if speed else {},
        min_speed=min_speed,
    )
    found = recommend(options)
    if out is None:
        console.result(recipe_text(found), end="")
        return
    write_text(out, recipe_text(found))
    console.status(f"{out}: {found.bits:.3f} bits per weight, predicted loss {found.loss:.4g} nats per token")


def _fit(text: str) -> tuple[int, int]:
    from hymoe.imatrix.budget import parse_fit

    try:
        return parse_fit(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--fit") from exc


def _menu(text: str) -> list[str]:
    from hymoe.imatrix.recommend import MENU

    return [_type(part, MENU, "--menu") for part in text.split(",") if part.strip()]


def _type(text: str, allowed: tuple[str, ...], option: str) -> str:
    name = text.strip().upper()
    if name not in allowed:
        raise typer.BadParameter(f"{text.strip()!r}: give one of {', '.join(allowed)}", param_hint=option)
    return name


def _speeds(path: Path) -> dict[str, float]:
    import json

    from hymoe.errors import UnsupportedError

    expected = 'a JSON object such as {"Q4_K": 9e9}'
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UnsupportedError(f"{path}: speed table", got=exc, expected=expected) from exc
    if not isinstance(found, dict) or not all(isinstance(v, int | float) and v > 0 for v in found.values()):
        raise UnsupportedError(f"{path}: speed table", expected=expected)
    return {str(name): float(value) for name, value in found.items()}
