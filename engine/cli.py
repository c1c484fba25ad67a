"""`hy-engine`: build the engine, say what it is, say where it is."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hymoe import console

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)


class Backend(StrEnum):
    """What the engine computes on besides the processor; auto takes what is there."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    VULKAN = "vulkan"


Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")]
Stock = Annotated[bool, typer.Option("--stock", help="The unchanged peer of tests and benchmarks instead.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Details as well.")]


@app.callback()
def about() -> None:
    """The engine: llama.cpp at a pinned version with a few changes of ours, compiled for this machine."""


@app.command()
def build(
    backend: Annotated[Backend, typer.Option(help="What to compute on; auto takes what is there.")] = Backend.AUTO,
    jobs: Annotated[
        int | None, typer.Option("-j", "--jobs", min=1, help="Compilers at a time; as many as fit.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again even where it is built.")] = False,
    bindings: Annotated[bool, typer.Option(help="Install llama-cpp-python into this Python as well.")] = True,
    stock: Stock = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fetch, change and compile the engine (minutes); where it is built already, only make it the one in use."""
    from hymoe.engine.build import BuildOptions, build

    console.set_verbosity(quiet=quiet, verbose=verbose)
    options = BuildOptions(backend=backend.value, jobs=jobs, force=force, bindings=bindings, stock=stock)
    engine = build(options)
    console.status(f"the engine is ready: {engine.bin}")


@app.command()
def info() -> None:
    """Show what the engine in use is made of."""
    from hymoe.engine.info import describe

    console.result(describe())


@app.command()
def path(stock: Stock = False) -> None:
    """Print the folder of the engine's executables and libraries."""
    from hymoe.engine import find

    console.result(str(find(stock=stock).bin))


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar.gz", help="The archive to write; it is replaced.")],
    quiet: Quiet = False,
) -> None:
    """Write the changed source, with a script that builds it, for a machine without a network.

    There: `sh build.sh cpu|cuda|vulkan|metal DIR`, and HYMOE_ENGINE=DIR.
    """
    from hymoe.engine import export

    console.set_verbosity(quiet=quiet)
    export.say(file, export.export(file))


@app.command()
def rpc(
    host: Annotated[str, typer.Option(help="IPv4 address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 50052,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Offer this device; may be repeated.", show_default="all GPUs"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="Threads of the processor as a device.", show_default="half of the cores"),
    ] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Keep what is sent on disk, for the next time.")] = False,
    quiet: Quiet = False,
) -> None:
    """Offer this machine's devices to `hy-serve --rpc` on another one.

    There is no key and no encryption, and whoever reaches the port can take over the process: a private network or a
    tunnel only. Both machines need the same engine.
    """
    from hymoe.engine.rpc import WorkerOptions, serve

    console.set_verbosity(quiet=quiet)
    serve(WorkerOptions(host=host, port=port, devices=tuple(device or ()), threads=threads, cache=cache))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status."""
    return console.run(app, argv, "hy-engine")
