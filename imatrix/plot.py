"""A plot of bits per weight against mean KL, as SVG: text that a page shows and a repository can compare.

Written here because it is a hundred lines of markup: a plotting library would be the heaviest dependency of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, floor, log10
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 20, 60
COLOURS: Final = ("#1f6fb4", "#d1603d", "#3d8a4f", "#7a4fa3", "#666666")


class Point(NamedTuple):
    """A file: bits per weight, mean KL in nats, and what stands beside it."""

    bits: float
    loss: float
    label: str


class _Scale(NamedTuple):
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def svg(series: Mapping[str, Sequence[Point]]) -> str:
    """Draw lines of points by name; KL is on a logarithmic scale, and a KL of zero at its bottom."""
    points = [point for line in series.values() for point in line]
    x = _Scale(*_padded([p.bits for p in points]), LEFT, WIDTH - RIGHT)
    losses = [p.loss for p in points if p.loss > 0] or [1e-6]
    y = _Scale(floor(log10(min(losses))), max(ceil(log10(max(losses))), floor(log10(min(losses))) + 1),
               HEIGHT - BOTTOM, TOP)  # fmt: skip
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_axes(x, y),
    ]
    for number, (name, line) in enumerate(series.items()):
        parts += _line(name, sorted(line), number, x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max(0.25, 0.08 * (high - low))
    return low - room, high + 2 * room


def _axes(x: _Scale, y: _Scale) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in range(int(y.low), int(y.high) + 1):
        at = y.at(tick)
        yield f'<line x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#dddddd"/>'
        yield f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**tick:g}</text>'
    step = 0.5 if x.high - x.low < 4 else 1.0
    for number in range(ceil(x.low / step), floor(x.high / step) + 1):
        at = x.at(number * step)
        yield f'<line x1="{at:.1f}" y1="{bottom}" x2="{at:.1f}" y2="{bottom + 5}" stroke="#333333"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{number * step:g}</text>'
    yield f'<path d="M{LEFT} {TOP} V{bottom} H{right}" fill="none" stroke="#333333"/>'
    yield f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 15}" text-anchor="middle">bits per weight</text>'
    middle = (TOP + bottom) / 2
    yield f'<text transform="translate(20 {middle}) rotate(-90)" text-anchor="middle">mean KL divergence, nats</text>'


def _line(name: str, points: Sequence[Point], number: int, x: _Scale, y: _Scale) -> Iterator[str]:
    colour = COLOURS[number % len(COLOURS)]
    places = [(x.at(p.bits), y.at(log10(p.loss) if p.loss > 0 else y.low)) for p in points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>'
    for (a, b), point in zip(places, points, strict=True):
        yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>'
        yield f'<text x="{a + 7:.1f}" y="{b - 6:.1f}" fill="{colour}">{escape(point.label)}</text>'
    at = TOP + 16 * (number + 1)
    yield f'<text x="{WIDTH - RIGHT - 8}" y="{at}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
