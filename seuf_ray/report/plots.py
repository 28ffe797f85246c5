"""Pictures of many trials as inline SVG: a scatter with its front, and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from seuf_ray.report.charts import HEAT_STEPS, Axes, Frame, grid_lines, guide_lines, padded, picture


@dataclass(frozen=True)
class Dot:
    """One trial in the plane: `colour` is a CSS colour, a hollow one came to less than it might."""

    x: float
    y: float
    label: str
    colour: str
    is_hollow: bool = False
    is_marked: bool = False


def scatter(dots: Sequence[Dot], front: Sequence[tuple[float, float]], axes: Axes) -> str:
    """Dots with tooltips, and the front as a staircase: what lies below and right of it is beaten."""
    drawn = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    if not drawn:
        return '<p class="note">no trial has a result</p>'
    xs = [dot.x for dot in drawn] + [x for x, _ in axes.x_guides]
    ys = [dot.y for dot in drawn] + [y for y, _ in axes.y_guides]
    frame = Frame(padded(xs, 0.05), padded(ys, 0.06), axes)
    body = [*grid_lines(frame), *guide_lines(frame), *_staircase(frame, front)]
    body += [_dot(frame, dot) for dot in sorted(drawn, key=lambda dot: dot.is_marked)]
    return picture(axes.width, axes.height, body, axes.y_label, "min-width:580px")


def _staircase(frame: Frame, front: Sequence[tuple[float, float]]) -> Iterable[str]:
    corners: list[tuple[float, float]] = []
    best = -math.inf
    for x, y in sorted(front, key=lambda point: (point[0], -point[1])):
        if y > best:
            corners += [(x, best), (x, y)] if corners else [(x, y)]
            best = y
    if corners:
        corners.append((frame.x[1], best))
        points = " ".join(f"{left},{top}" for left, top in (frame.at(x, y) for x, y in corners))
        yield f'<polyline class="front" points="{points}"><title>the Pareto front</title></polyline>'


def _dot(frame: Frame, dot: Dot) -> str:
    x, y = frame.at(dot.x, dot.y)
    fill = "none" if dot.is_hollow else dot.colour
    kind, radius = ("best", 8) if dot.is_marked else ("trial", 4.5)
    style = f"fill:{fill};stroke:{dot.colour}"
    title = f"<title>{escape(dot.label)}</title>"
    return f'<circle class="{kind}" cx="{x}" cy="{y}" r="{radius}" style="{style}">{title}</circle>'


@dataclass(frozen=True)
class Coordinate:
    """One axis: words for its ends or values, and each trial's place on it from 0 to 1, None where it has none."""

    name: str
    words: Sequence[tuple[float, str]]
    places: Sequence[float | None]


def parallel(
    coordinates: Sequence[Coordinate], colours: Sequence[str], labels: Sequence[str], marked: Collection[int]
) -> str:
    """One line per trial over all axes; the marked ones on top. A trial without a path passes below its axis."""
    width, height, top = max(620, 150 * len(coordinates)), 300, 34
    step = (width - 150) / max(len(coordinates) - 1, 1)
    xs = [75 + step * index for index in range(len(coordinates))]
    order = sorted(range(len(labels)), key=lambda trial: trial in marked)
    body = [_path(coordinates, xs, trial, colours[trial], labels[trial], trial in marked) for trial in order]
    for x, coordinate in zip(xs, coordinates, strict=True):
        body.append(f'<line class="axis strong" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 46}"/>')
        body.append(
            f'<text class="head" x="{x:.1f}" y="18" text-anchor="middle">{escape(coordinate.name)}</text>'
        )
        for place, word in coordinate.words:
            y = _height(place)
            body.append(f'<text class="halo" x="{x + 6:.1f}" y="{y + 4:.1f}">{escape(word)}</text>')
    return picture(math.ceil(width), height, body, "parallel coordinates", "min-width:580px")


def _height(place: float | None) -> float:
    return 278.0 if place is None else 254.0 - 220.0 * place


def _path(
    coordinates: Sequence[Coordinate], xs: Sequence[float], trial: int, colour: str, label: str, bold: bool
) -> str:
    places = [_height(coordinate.places[trial]) for coordinate in coordinates]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, places, strict=True))
    kind = "thread bold" if bold else "thread"
    title = f"<title>{escape(label)}</title>"
    return f'<polyline class="{kind}" style="stroke:{colour}" points="{points}">{title}</polyline>'


def heat(share: float) -> str:
    """The colour of a share of the way from worst to best."""
    return f"var(--h{round(min(max(share, 0.0), 1.0) * (HEAT_STEPS - 3)) + 2})"
