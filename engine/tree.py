"""Unpack the pinned source with our changes, to read it or make a patch: `python -m hymoe.engine.tree DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hymoe import console
from hymoe.errors import EngineError

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def write(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    stock: Annotated[bool, typer.Option("--stock", help="Only what the stock engine needs to run at all.")] = False,
) -> None:
    """Write the engine's source tree into FOLDER."""
    from hymoe.engine import patches, source
    from hymoe.engine.installed import engine_root

    if folder.exists() and any(folder.iterdir()):
        raise EngineError(f"{folder} is not empty", fix="name a new folder")
    source.extract(source.fetch(engine_root() / "sdist"), folder)
    patches.apply(folder, stock=stock)
    console.result(str(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status."""
    return console.run(app, argv, "python -m hymoe.engine.tree")


if __name__ == "__main__":
    raise SystemExit(main())
