"""What `hy-plan` prints: where everything goes, a bar for each memory, the speeds, and the command that does it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hymoe.console import format_bytes
from hymoe.runtime.planned import Memory, Plan, Speeds

# Field of Memory -> what it is called, its letter in the bar, its colour.
PARTS: Final = {
    "layers": ("attention, shared experts, norms", "A", "blue"),
    "experts": ("experts", "E", "green"),
    "output": ("output matrix", "O", "cyan"),
    "embedding": ("token embeddings", "T", "cyan"),
    "kv": ("KV cache", "K", "magenta"),
    "compute": ("compute buffers", "C", "yellow"),
    "process": ("the server itself", "S", "white"),
}
BAR_WIDTH: Final = 50


def view(plan: Plan) -> RenderableType:
    """Draw the whole plan but for the command."""
    return Group(Text(headline(plan)), Text(), memories(plan), Text(), *bars(plan), Text(), *speeds(plan))


def headline(plan: Plan) -> str:
    """Say what the model is, and how the engine will be set."""
    layout, shape = plan.layout, plan.layout.shape
    setting = plan.setting
    bits = 8 * layout.n_bytes / layout.n_params
    return (
        f"{layout.name}: {format_bytes(layout.n_bytes)}, {layout.n_params / 1e9:.1f} B weights of {bits:.2f} bits, "
        f"{shape.n_layer} layers, {shape.n_expert_used} of {shape.n_expert} experts\n"
        f"context of {setting.n_ctx} tokens in {setting.kv_type}, ubatch {setting.n_ubatch}"
    )


def memories(plan: Plan) -> Table:
    """Give a row for everything that takes room, and a column for each memory."""
    table = Table("", *(memory.name for memory in plan.memories), box=None, header_style="", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for field, (label, letter, colour) in PARTS.items():
        values = [getattr(memory, field) for memory in plan.memories]
        if any(values):
            counts = _counts(plan, field)
            cells = (f"{count}{format_bytes(n)}" if n else "" for n, count in zip(values, counts, strict=True))
            table.add_row(Text(f"{letter} {label}", style=colour), *cells)
    table.add_row(Text("- stays free", style="dim"), *(format_bytes(memory.margin) for memory in plan.memories))
    table.add_row(Text(". left", style="dim"), *(format_bytes(memory.free) for memory in plan.memories))
    return table


def _counts(plan: Plan, field: str) -> list[str]:
    """Say of how many layers a memory has the weights or the experts."""
    own = [run.last - run.first for run in plan.runs]
    experts = [len(run.experts) for run in plan.runs]
    n_layer = plan.layout.shape.n_layer
    counts = {"layers": [*own, n_layer - sum(own)], "experts": [*experts, n_layer - sum(experts)]}.get(field)
    return [f"{count} layers, " for count in counts] if counts else [""] * len(plan.memories)


def bars(plan: Plan) -> Iterator[Text]:
    """Give a line for each memory: letters for what takes it, `-` for what stays free, `.` for what is left."""
    width = max(len(memory.name) for memory in plan.memories)
    for memory in plan.memories:
        yield Text.assemble(f"{memory.name:{width}} ", *_segments(memory), f" {format_bytes(memory.n_bytes)}")


def _segments(memory: Memory) -> Iterator[tuple[str, str]]:
    parts = [(getattr(memory, field), letter, colour) for field, (_, letter, colour) in PARTS.items()]
    parts += [(memory.free, ".", "dim"), (memory.margin, "-", "dim")]
    total = before = 0
    for n_bytes, letter, colour in parts:
        total += n_bytes
        end = round(BAR_WIDTH * total / memory.n_bytes)
        yield letter * (end - before), colour
        before = end


def speeds(plan: Plan) -> Iterator[Text]:
    """Give the predictions, and what each token costs to read."""
    found, use = plan.speeds, plan.use
    read = " + ".join(
        f"{format_bytes(found.read[name])} from {name} ({format_bytes(rate)}/s)" for name, rate in found.rates.items()
    )
    yield Text(f"prompt  {found.prefill:7.1f} tokens/s for {use.n_prompt} tokens; limited by {found.prefill_limit}")
    yield Text(f"answer  {found.generation:7.1f} tokens/s; limited by {found.generation_limit}")
    yield Text(f"        each token reads {read}")
    yield Text(f"Speeds are predicted, from rates {basis(found)}.", style="dim")


def basis(speeds: Speeds) -> str:
    """Say where the rates come from, and of which memories where that differs."""
    names: dict[str, list[str]] = {}
    for name, source in speeds.sources.items():
        names.setdefault(source, []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return " and ".join(f"{source} ({', '.join(which)})" for source, which in names.items())


def command(plan: Plan, tool: str, model: str) -> str:
    """Give the shell command that runs the plan by hand. tool: the server's path; model: the file's."""
    variables = [f"{name}={value}" for name, value in plan.environment().items()]
    return shlex.join([*variables, tool, "--model", model, *plan.arguments()])
