"""A line chart as SVG text: both axes logarithmic, no library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 40, 50
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def lines(title: str, x_name: str, y_name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The chart of named lines, each of points ``(x, y)``; points that are not above 0 are left out."""
    drawn = {name: sorted((x, y) for x, y in points if x > 0 and y > 0) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    every = [point for points in drawn.values() for point in points]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    if not every:
        return "\n".join([*parts, f'<text x="{LEFT}" y="80">nothing was measured</text>', "</svg>"]) + "\n"
    (x_low, x_high), (y_low, y_high) = (_range([point[axis] for point in every]) for axis in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - math.log(x_low)) / (math.log(x_high) - math.log(x_low))
        up = (math.log(y) - math.log(y_low)) / (math.log(y_high) - math.log(y_low))
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for x in _ticks(x_low, x_high, 2):
        here = at(x, y_low)
        parts.append(f'<line x1="{here[0]:.1f}" y1="{TOP}" x2="{here[0]:.1f}" y2="{here[1]:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{here[0]:.1f}" y="{here[1] + 16:.1f}" text-anchor="middle">{_short(x)}</text>')
    for y in _ticks(y_low, y_high, 10):
        here = at(x_low, y)
        parts.append(f'<line x1="{LEFT}" y1="{here[1]:.1f}" x2="{WIDTH - RIGHT}" y2="{here[1]:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{here[1] + 4:.1f}" text-anchor="end">{y:g}</text>')
    for place, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[place % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in (at(*p) for p in points)]
        y_label = TOP + 14 + 18 * place
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{y_label}" fill="{colour}">{escape(name)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_name)}</text>'
    )
    parts.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _range(numbers: list[float]) -> tuple[float, float]:
    low, high = min(numbers), max(numbers)
    return (low, high) if low < high else (low / 2, high * 2)


def _ticks(low: float, high: float, base: int) -> list[float]:
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    return [float(base) ** power for power in range(first, last + 1)]


def _short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}"
