"""Utility against forget accuracy along training: one panel for each algorithm, one line for each method.

A point is the mean over seeds after so many steps, its cross the standard deviation both ways. The picture is one SVG
file with its colours in it, white behind, so that it can be looked at anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from statistics import mean, stdev

from seuf_ray.paper.cells import Result
from seuf_ray.paper.methods import METHODS
from seuf_ray.paper.tables import NAMES

COLOURS = (
    "#666666", "#b5651d", "#8e44ad", "#1b6ca8", "#1a8f5a", "#c0392b", "#d4a017",
    "#17a2b8", "#e377c2", "#7f6000", "#000000", "#8fbc8f", "#ff7f0e",
)  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, SIDE = 400, 270, 46, 30, 12  # of a panel
STYLE = "text{font:11px sans-serif;fill:#333}.t{font-weight:bold;font-size:13px}.g{stroke:#ddd}.d{stroke-dasharray:3}"
Bar = tuple[float, float, float, float]  # mean forget, mean utility, and their standard deviations


def picture(
    results: Sequence[Result], methods: Sequence[str], algorithms: Sequence[str], level: float
) -> str:
    """The SVG document; panels two by two, the legend below."""
    curves = {a: {name: curve_of(results, name, a) for name in methods} for a in algorithms}
    lowest = min(
        (bar[1] - bar[3] for each in curves.values() for c in each.values() for bar in c), default=0.0
    )
    floor = max(
        0.0, min(0.75, math.floor(4 * lowest) / 4)
    )  # where everything is near 1, that is what is shown
    body = []
    for number, algorithm in enumerate(algorithms):
        x, y = (number % 2) * WIDTH, (number // 2) * HEIGHT
        panel = "".join(_panel(NAMES[algorithm], curves[algorithm], level, floor))
        body.append(f'<g transform="translate({x} {y})">{panel}</g>')
    top = -(-len(algorithms) // 2) * HEIGHT
    legend, height = _legend(methods, top + 16)
    body += legend
    box = f"0 0 {2 * WIDTH} {height}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{2 * WIDTH}" height="{height}">'
    back = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{head}<style>{STYLE}</style>{back}{''.join(body)}</svg>\n"


def curve_of(results: Iterable[Result], method: str, algorithm: str) -> list[Bar]:
    """Step by step over the seeds; a step that not every seed has is left out."""
    curves = [
        {point["step"]: (point["forget_accuracy"], point["utility"]) for point in result["curve"]}
        for result in results
        if (result["row"]["method"], result["row"]["algorithm"]) == (method, algorithm) and result["curve"]
    ]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [_bar([curve[step] for curve in curves]) for step in steps]


def _bar(points: Sequence[tuple[float, float]]) -> Bar:
    forget, utility = zip(*points, strict=True)
    wide = len(points) > 1
    return mean(forget), mean(utility), stdev(forget) if wide else 0.0, stdev(utility) if wide else 0.0


def _at(forget: float, utility: float, floor: float) -> tuple[float, float]:
    """Forgetting goes to the right: accuracy 1 is on the left; utility from `floor` to 1."""
    x = LEFT + (1 - forget) * (WIDTH - LEFT - SIDE)
    return round(x, 1), round(TOP + (1 - utility) / (1 - floor) * (HEIGHT - TOP - 40), 1)


def _panel(title: str, curves: dict[str, list[Bar]], level: float, floor: float) -> Iterator[str]:
    yield f'<text class="t" x="{LEFT}" y="18">{escape(title)}</text>'
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = floor + share * (1 - floor)
        (left, y), (right, _) = _at(1, height, floor), _at(0, height, floor)
        yield f'<line class="g" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{height:.3g}</text>'
        x, bottom = _at(share, floor, floor)
        yield f'<text x="{x}" y="{bottom + 15}" text-anchor="middle">{share:g}</text>'
    for value in (level, 0.25):
        (x, top), (_, bottom) = _at(value, 1, floor), _at(value, floor, floor)
        yield f'<line class="g d" style="stroke:#999" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'
    x, bottom = _at(0, floor, floor)
    yield f'<text x="{x}" y="{bottom + 29}" text-anchor="end">forget accuracy → less</text>'
    yield f'<text x="4" y="{bottom + 29}">↑ utility</text>'
    for number, curve in enumerate(curves.values()):
        yield from _line(curve, COLOURS[number % len(COLOURS)], floor)


def _line(curve: Sequence[Bar], colour: str, floor: float) -> Iterator[str]:
    places = [_at(forget, utility, floor) for forget, utility, _, _ in curve]
    points = " ".join(f"{x},{y}" for x, y in places)
    yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for forget, utility, wide, high in curve:
        ends = _at(forget + wide, utility, floor), _at(forget - wide, utility, floor)
        yield f'<path d="M{ends[0][0]} {ends[0][1]}H{ends[1][0]}" stroke="{colour}" opacity=".45"/>'
        x, top = _at(forget, utility + high, floor)
        yield f'<path d="M{x} {top}V{_at(forget, utility - high, floor)[1]}" stroke="{colour}" opacity=".45"/>'
    yield from (f'<circle cx="{x}" cy="{y}" r="2.6" fill="{colour}"/>' for x, y in places)


def _legend(methods: Sequence[str], y: int) -> tuple[list[str], int]:
    """Names beside their colours, in as many lines as they need; and where the picture ends."""
    x, found = 12.0, []
    for number, name in enumerate(methods):
        wide = 38 + 6 * len(METHODS[name].label)
        if x + wide > 2 * WIDTH:
            x, y = 12.0, y + 16
        found.append(
            f'<rect x="{x:.0f}" y="{y - 8}" width="12" height="4" fill="{COLOURS[number % len(COLOURS)]}"/>'
            f'<text x="{x + 17:.0f}" y="{y}">{escape(METHODS[name].label)}</text>'
        )
        x += wide
    return found, y + 18
