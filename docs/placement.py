"""Write the table of placements into docs/placement.md; `--check` only says whether it is true.

`python docs/placement.py CONFIG [--check]`: CONFIG is the folder of Hunyuan-A13B's config.json; nothing else of the
model is needed, and no card. The engine counts the buffers, so it must be built.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hymoe.convert import paper
from hymoe.errors import PlacementError
from hymoe.runtime import layout
from hymoe.runtime.layout import Layout
from hymoe.runtime.machine import Machine
from hymoe.runtime.planned import Plan, Wish
from hymoe.runtime.settle import settle

PAGE = Path(__file__).with_name("placement.md")
TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)
QUANTS = ("Q4_K_M", "Q3_K_M", "IQ4_XS")
GIB = 1 << 30
# GiB of each card, and of RAM
MACHINES = (((24,), 32), ((24,), 64), ((24,), 96), ((16,), 64), ((12,), 48), ((24, 24), 64))
CONTEXTS = (32768, 65536, 131072)
HEAD = ("cards + RAM", "context", "experts on cards", "cache", "ubatch", "prompt", "answer", "left on cards, in RAM")


def tables(config: Path) -> str:
    """Give the tables of all types, as Markdown."""
    return "\n".join(line for quant in QUANTS for line in (*table(config, quant), ""))


def table(config: Path, quant: str) -> Iterator[str]:
    """Give the lines of one type's table."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        paper.write(config, file, quant)
        model = layout.read(file)
        yield f"**{quant}**, {model.n_bytes / GIB:.1f} GiB:\n"
        yield f"| {' | '.join(HEAD)} |"
        yield f"|{'---|' * len(HEAD)}"
        for cards, ram in MACHINES:
            for n_ctx in CONTEXTS:
                yield row(file, model, cards, ram, n_ctx)


def row(file: Path, model: Layout, cards: tuple[int, ...], ram: int, n_ctx: int) -> str:
    """Give one line: a machine and a context."""
    machine = Machine.paper(vram=[size * GIB for size in cards], ram=ram * GIB)
    name = f"{' + '.join(map(str, cards))} + {ram}"
    try:
        found = settle(file, model, machine, Wish(n_ctx))
    except PlacementError as exc:
        return f"| {name} | {n_ctx} | {str(exc).partition('; it ')[2]} |{' |' * (len(HEAD) - 3)}"
    return f"| {name} | {n_ctx} | {' | '.join(cells(found))} |"


def cells(found: Plan) -> Iterator[str]:
    """Give what a line says of a plan."""
    setting = found.setting
    n_layer = found.layout.shape.n_layer
    yield f"{sum(len(run.experts) for run in found.runs)} of {n_layer} layers"
    yield setting.kv_type
    yield str(setting.n_ubatch)
    yield f"{found.speeds.prefill:.0f} t/s"
    yield f"{found.speeds.generation:.1f} t/s"
    assert all(memory.free >= 0 for memory in found.memories)
    yield ", ".join(f"{memory.free / GIB:.1f} GiB" for memory in found.memories)


def main(argv: list[str]) -> int:
    """Write the page, or with --check give 1 where it is stale."""
    text = PAGE.read_text(encoding="utf-8")
    new = TABLE.sub(lambda found: f"{found[1]}{tables(Path(argv[0]))}{found[2]}", text)
    if "--check" in argv:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
