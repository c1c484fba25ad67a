"""`hy-serve`: one engine process behind an OpenAI-style endpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hymoe import console
from hymoe.runtime.router import HELP, SHOWN_DEFAULT

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="The model; for a split one its first part.")]
Ctx = Annotated[
    int | None,
    typer.Option(
        min=0, help="Context in tokens; 0: all it was trained for.", show_default="the trained one up to 32768"
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; the engine chooses by default.")]
RouterMode = Annotated[str | None, typer.Option("--router", metavar="MODE", help=HELP, show_default=SHOWN_DEFAULT)]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="The engine's log too.")]
LogFile = Annotated[Path | None, typer.Option("--log", metavar="FILE", help="Append the engine's log to this file.")]


@app.command()
def serve(
    model: ModelPath,
    engine_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="-- LLAMA-SERVER-ARGUMENT", help="Passed on as they are.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8080,
    ctx: Ctx = None,
    threads: Threads = None,
    router: RouterMode = None,
    log: LogFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve MODEL.gguf on this machine until Ctrl-C (exit status 0, as for SIGTERM).

    HYMOE_API_KEY, where it is set, is the key that clients must send. Should the engine end by itself, its exit
    status is passed on.
    """
    from hymoe.runtime.router import parse
    from hymoe.runtime.server import ServerOptions
    from hymoe.runtime.supervise import supervise

    console.set_verbosity(quiet=quiet, verbose=verbose)
    options = ServerOptions(
        model=model,
        host=host,
        port=port,
        ctx=ctx,
        threads=threads,
        router=None if router is None else parse(router),
        api_key=os.environ.get("HYMOE_API_KEY") or os.environ.get("LLAMA_API_KEY") or None,
        extra=tuple(engine_arguments or ()),
        log=log,
    )
    raise typer.Exit(supervise(options))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return console.run(app, argv, "hy-serve")
