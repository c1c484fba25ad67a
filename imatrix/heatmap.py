"""Usage of experts as a picture: rows are layers, columns experts; in the terminal and as PNG.

Both show each expert's tokens as a share of what an even router would give it: half a bar is an even share, a full one
twice that or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hymoe.errors import OutputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hymoe.imatrix.coverage import Layer

BARS: Final = "▁▂▃▄▅▆▇█"
EVEN: Final = 0.5  # where an even share lies between nothing and full
CELL: Final = 14  # pixels of an expert
MARGIN: Final = 44
# From nothing to full; below the floor stands for itself.
COLOURS: Final = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
TOO_FEW: Final = (222, 45, 38)


def level(n_tokens: int, layer: Layer) -> float:
    """Give an expert's usage from 0 to 1, `EVEN` being the share of an even router."""
    even = layer.counts.sum() / len(layer.counts)
    return min(1.0, EVEN * n_tokens / even) if even else 0.0


def in_terminal(layers: Sequence[Layer], floor: int) -> RenderableType:
    """Give rows of bars, one for each expert; red ones met fewer than `floor` tokens, dots none."""
    from rich.text import Text

    picture = Text(no_wrap=True)
    for layer in layers:
        picture.append(f"{layer.index:>5} ")
        for n_tokens in layer.counts.tolist():
            bar = BARS[max(0, round(level(n_tokens, layer) * len(BARS)) - 1)] if n_tokens else "·"
            picture.append(bar, style="red" if n_tokens < floor else "blue")
        picture.append("\n")
    picture.rstrip()
    return picture


def write_png(path: Path, layers: Sequence[Layer], floor: int, title: str) -> None:
    """Draw the same as a PNG. Raises OutputError where it cannot be written."""
    from PIL import Image, ImageDraw

    n_expert = max(len(layer.counts) for layer in layers)
    width, height = MARGIN + n_expert * CELL + CELL, MARGIN + len(layers) * CELL + 2 * CELL
    image = Image.new("RGB", (max(width, 420), height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((CELL, 6), title, fill="black")
    step = 8 if n_expert > 16 else 1
    for expert in range(0, n_expert, step):
        draw.text((MARGIN + expert * CELL + 2, MARGIN - CELL), str(expert), fill="black")
    for row, layer in enumerate(layers):
        top = MARGIN + row * CELL
        draw.text((CELL, top + 1), str(layer.index), fill="black")
        for expert, n_tokens in enumerate(layer.counts.tolist()):
            left = MARGIN + expert * CELL
            colour = TOO_FEW if n_tokens < floor else _colour(level(n_tokens, layer))
            draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=colour)
    legend = f"rows: layers, columns: experts; blue: tokens, from none to twice an even share; red: fewer than {floor}"
    draw.text((CELL, height - CELL - 4), legend, fill="black")
    try:
        image.save(path, format="PNG")
    except OSError as exc:
        raise OutputError(f"{path}: cannot be written", got=exc.strerror or exc) from exc


def _colour(share: float) -> tuple[int, int, int]:
    """Blend the colours: 0 the first, 0.5 the second, 1 the third."""
    low = min(int(share * 2), 1)
    part = share * 2 - low
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(COLOURS[low], COLOURS[low + 1], strict=True))
    return red, green, blue
