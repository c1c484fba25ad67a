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
        min=0,
        help="Context in tokens; 0: all it was trained for.",
        show_default="the trained one up to 32768, as far as it fits",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, max=512, help="CPU threads instead of one for each core.")]
RouterMode = Annotated[str | None, typer.Option("--router", metavar="MODE", help=HELP, show_default=SHOWN_DEFAULT)]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="The engine's log too.")]
LogFile = Annotated[Path | None, typer.Option("--log", metavar="FILE", help="Append the engine's log to this file.")]
Rpc = Annotated[
    str | None,
    typer.Option("--rpc", metavar="HOST:PORT,…", help="Use the devices of these workers too (hy-engine rpc)."),
]
ServeLog = Annotated[
    Path | None,
    typer.Option(
        "--log", metavar="FILE", help="Append the engine's log to this file.", show_default="one that is kept small"
    ),
]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="Keys that clients may send, one a line.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Serve other machines without a key.")]
Drain = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="How long running answers may take when it is stopped.")
]


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
    rpc: Rpc = None,
    api_key_file: KeyFile = None,
    insecure: Insecure = False,
    drain: Drain = 30.0,
    log: ServeLog = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve MODEL.gguf on this machine until Ctrl-C or SIGTERM (exit status 0; running answers are finished first).

    HYMOE_API_KEY, where it is set, is a key that clients must send; serving other machines needs one. An engine that
    crashes is started again on the same port. One that cannot start passes on its exit status.
    """
    from hymoe.runtime.router import parse
    from hymoe.runtime.server import ServerOptions
    from hymoe.runtime.supervise import LOG_LIMIT, default_log, supervise
    from hymoe.runtime.workers import parse as parse_workers

    console.set_verbosity(quiet=quiet, verbose=verbose)
    options = ServerOptions(
        model=model,
        host=host,
        port=port,
        ctx=ctx,
        threads=threads,
        router=None if router is None else parse(router),
        api_key=os.environ.get("HYMOE_API_KEY") or os.environ.get("LLAMA_API_KEY") or None,
        api_key_file=api_key_file,
        rpc=parse_workers(rpc or ""),
        insecure=insecure,
        extra=tuple(engine_arguments or ()),
        log=log or default_log(port),
        log_limit=None if log else LOG_LIMIT,
    )
    raise typer.Exit(supervise(options, drain))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return console.run(app, argv, "hy-serve")
