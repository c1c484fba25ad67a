"""`hy-chat`: talk to a model, on a private server or on one that runs already."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hymoe import console
from hymoe.runtime.serve_cli import Ctx, LogFile, Quiet, RouterMode, Threads, Verbose

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def chat(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.gguf", help="The model, unless --url is given.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Use the server at this address; its key is HYMOE_API_KEY.")] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Answer this and end; - reads it from stdin, as a pipe does.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The answer as one JSON object: content, reasoning_content, usage, timings.")
    ] = False,
    file: Annotated[
        list[Path] | None, typer.Option("-f", "--file", metavar="FILE", help="Text that goes with the question.")
    ] = None,
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on with a conversation that /save wrote.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    think: Annotated[
        str | None, typer.Option(metavar="on|off|N", help="Whether to think first, or for N tokens at most.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    ctx: Ctx = None,
    threads: Threads = None,
    router: RouterMode = None,
    log: LogFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk to MODEL.gguf; the answer goes to stdout.

    A private server is started for the length of the conversation, on a free port and with a random key, because
    any page in a browser could talk to an open one.
    """
    from hymoe.runtime.endpoint import endpoint_from_url
    from hymoe.runtime.router import parse
    from hymoe.runtime.server import ServerExitError, ServerOptions
    from hymoe.runtime.session import ChatOptions, attached, private, read_prompt
    from hymoe.runtime.settings import Settings
    from hymoe.runtime.supervise import show_exit

    if (model is None) == (url is None):
        raise typer.BadParameter("give either MODEL.gguf or --url")
    if url is not None and (ctx, threads, router, log) != (None,) * 4:
        raise typer.BadParameter("--ctx, --threads, --router and --log belong to the server that --url names")
    console.set_verbosity(quiet=quiet, verbose=verbose)
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = read_prompt(sys.stdin.buffer)
    if as_json and prompt is None:
        raise typer.BadParameter("--json needs a prompt: -p, or a pipe")
    settings = Settings({} if max_tokens is None else {"max_tokens": max_tokens})
    if think is not None:
        settings.set_thinking(think if think in ("on", "off") else f"budget {think}")
    options = ChatOptions(prompt, system, tuple(file or ()), load, as_json, settings)
    try:
        if url is not None:
            attached(endpoint_from_url(url, os.environ.get("HYMOE_API_KEY") or None), options)
        elif model is not None:
            mode = None if router is None else parse(router)
            private(ServerOptions(model=model, ctx=ctx, threads=threads, router=mode, log=log), options)
    except ServerExitError as exc:
        show_exit(exc)
        raise typer.Exit(1) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return console.run(app, argv, "hy-chat")
