"""`hy-plan`: where a model's bytes would go on this machine, or on another, and how fast it would be."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hymoe import console
from hymoe.convert.quants import Quant
from hymoe.errors import PlacementError

if TYPE_CHECKING:
    from hymoe.runtime.machine import Machine
    from hymoe.runtime.planned import Plan, Wish
    from hymoe.runtime.tune import Tuned

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

DEFAULT_QUANT = Quant.Q4_K_M


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF (for a split one its first part), or the folder of a checkpoint or a repository of the "
            "Hugging Face hub (org/name), of which only config and headers are looked at.",
        ),
    ],
    ctx: Annotated[
        int | None,
        typer.Option(
            min=0, help="Context in tokens; 0: all it was trained for.", show_default="what the purpose wants and fits"
        ),
    ] = None,
    purpose: Annotated[
        Literal["default", "chat", "long-context", "prefill"],
        typer.Option(
            "--for",
            help="What to make fast: a prompt of 4096 tokens and an answer of 500; 512 and 500; 32768 and 1000; "
            "16384 and 100.",
        ),
    ] = "default",
    kv: Annotated[
        Literal["f16", "q8_0", "q4_0"] | None,
        typer.Option(help="Type of the KV cache.", show_default="f16, or q8_0 where that is faster"),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, max=256, help="Requests at a time, which share the context.")
    ] = None,
    quant: Annotated[
        Quant | None,
        typer.Option(
            case_sensitive=False,
            metavar="TYPE",
            help="What a checkpoint is to be converted to, as for hy-convert.",
            show_default=DEFAULT_QUANT.value,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix, as for hy-convert: it may change types.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Types for single tensors of a checkpoint, as for hy-convert.")
    ] = None,
    vram: Annotated[
        list[int] | None,
        typer.Option(
            metavar="SIZE",
            parser=console.parse_size,
            help="Free memory of a GPU instead of what is found; again for the next GPU.",
        ),
    ] = None,
    ram: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=console.parse_size, help="Usable RAM instead of what is found.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=512, help="CPU threads instead of one for each core.")
    ] = None,
    rpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT,…", help="Workers (hy-engine rpc) whose devices take part.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure first what no formula knows, about a minute, and remember it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More detail.")] = False,
) -> None:
    """Decide where a model's weights, cache and buffers go, and predict how fast it will be.

    Prints what lies in each memory, the speeds and what limits them, and the llama-server command that does the same.
    Nothing is loaded. Sizes are bytes, or a number with K, M or G for powers of 1000.
    """
    from hymoe.runtime.machine import probe
    from hymoe.runtime.planned import Wish
    from hymoe.runtime.process import signals_as_exceptions
    from hymoe.runtime.workers import parse as parse_workers

    console.set_verbosity(quiet=quiet, verbose=verbose)
    if tune and not _is_file(model):
        raise PlacementError("--tune", got="a checkpoint", expected="a GGUF", fix="what is measured is its weights")
    workers = parse_workers(rpc or "")
    wish = Wish(n_ctx=ctx, purpose=purpose, kv_type=kv, n_parallel=parallel, rpc=workers, lockable=lockable())
    # a checkpoint's plan is made from a file that goes however we end
    with signals_as_exceptions(), _file(model, quant, imatrix, recipe) as file:
        machine = with_cards(probe(ram=ram, threads=threads, rpc=workers, fresh=tune), vram or ())
        _print(_plan(file, machine, wish, tune=tune), model, as_json=as_json)


def with_cards(machine: Machine, sizes: Sequence[int]) -> Machine:
    """Give its GPUs so much free memory; where there are not as many, cards on paper take their place."""
    from hymoe.runtime.machine import Machine as Machines

    if not sizes:
        return machine
    cards = [device for device in machine.devices if device.kind != "rpc"]
    if len(cards) == len(sizes):
        resized = dict(zip((card.name for card in cards), sizes, strict=True))
        devices = (
            replace(device, free=resized[device.name], total=max(device.total, resized[device.name]))
            if device.name in resized
            else device
            for device in machine.devices
        )
        return replace(machine, devices=tuple(devices))
    if len(cards) < len(machine.devices):
        expected = f"{len(cards)}, one for each GPU that is here, as workers are to take part"
        raise PlacementError("--vram", got=f"{len(sizes)} sizes", expected=expected)
    paper = Machines.paper(vram=sizes, ram=machine.ram_total)
    devices_on_paper = tuple(replace(device, free=device.total) for device in paper.devices)
    return replace(machine, devices=devices_on_paper, is_paper=True)


def _is_file(model: str) -> bool:
    """Whether a GGUF is meant, there or not, and no checkpoint."""
    path = Path(model)
    return path.is_file() or path.suffix == ".gguf"


@contextmanager
def _file(model: str, quant: Quant | None, imatrix: Path | None, recipe: Path | None) -> Iterator[Path]:
    """Give a GGUF: the one that is named, or for a checkpoint one that has all but the weights."""
    path = Path(model)
    if _is_file(model):
        if quant or imatrix or recipe:
            raise PlacementError(f"{model}: its types are chosen", fix="--quant and the like are for checkpoints")
        yield path
        return
    from hymoe.convert import paper

    with tempfile.TemporaryDirectory(prefix="hymoe-") as folder:
        out = Path(folder) / f"{path.absolute().name}-{quant or DEFAULT_QUANT}.gguf"
        paper.write(model, out, quant or DEFAULT_QUANT, imatrix, recipe)
        yield out


def _plan(file: Path, machine: Machine, wish: Wish, *, tune: bool) -> Plan:
    from hymoe.runtime import layout
    from hymoe.runtime.settle import settle

    model = layout.read(file)
    trained = model.shape.n_ctx_train
    if wish.n_ctx and trained and wish.n_ctx > trained:
        console.warn(
            f"--ctx {wish.n_ctx} is more than the {trained} tokens the model was trained for: planned with those"
        )
    found = settle(file, model, machine, wish, _tuned(file, machine, wanted=tune))
    if found.tuned is None and not machine.is_paper and (found.ram.experts or found.ram.layers):
        console.status(
            "nothing was measured on this model: `hy-plan --tune` finds its best settings, in about a minute"
        )
    return found


def _tuned(file: Path, machine: Machine, *, wanted: bool) -> Tuned | None:
    """Measure if that is wanted, else give what was measured before."""
    from hymoe.runtime import tune

    if not wanted:
        return tune.known(file, machine)
    return tune.tune(file, machine)


def _print(plan: Plan, model: str, *, as_json: bool) -> None:
    from hymoe import engine
    from hymoe.runtime import plan_view

    if as_json:
        console.result(json.dumps(plan.to_json(), indent=2))
        return
    tool = "llama-server" if plan.machine.is_paper else str(engine.find().tool("llama-server"))
    file = model if _is_file(model) else plan.layout.name
    console.table(plan_view.view(plan))
    console.result()
    console.result(plan_view.command(plan, tool, file))
    if plan.machine.is_paper and plan.devices:
        console.status("the devices are on paper: put the names that `llama-server --list-devices` prints there")


def lockable() -> int:
    """Give the bytes that this process, and with it the engine, may lock in RAM."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return console.run(app, argv, "hy-plan")
