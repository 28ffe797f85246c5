"""Pictures as inline SVG strings: line charts, a heat map, and before/after tracks.

Colours are CSS variables of the page (`report.css`), so one picture serves light and dark; `heat_css` makes the
colour scale. Everything that comes from outside is escaped; numbers that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

HEAT_STEPS = 24
_LIGHT = ("#eef3f7", "#b9d7ea", "#5fa8d3", "#1b6ca8", "#0b2545")
_DARK = ("#1f2732", "#1f4e79", "#2f8fc4", "#7fd1c9", "#fdf3b4")
_DENSE = 25  # above this, a line's points appear only under the mouse
_MANY_POINTS = 600  # above this, tooltips say the line's last value instead of every point's


@dataclass(frozen=True)
class Line:
    """One curve: `colour` is a CSS colour, `final` marks its last point."""

    label: str
    points: Sequence[Point]
    colour: str
    bold: bool = False
    dashed: bool = False
    final: bool = False

    @property
    def finite(self) -> list[Point]:
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Axes:
    """What surrounds the curves; guides are dashed lines with a word at them."""

    x_label: str = "step"
    y_label: str = ""
    y_range: tuple[float, float] | None = None
    y_guides: Sequence[tuple[float, str]] = ()
    x_guides: Sequence[tuple[float, str]] = ()
    width: int = 460
    height: int = 230


@dataclass(frozen=True)
class Frame:
    """Data coordinates -> picture coordinates."""

    x: tuple[float, float]
    y: tuple[float, float]
    axes: Axes

    left, right, top, bottom = 48, 14, 12, 36

    def at(self, x: float, y: float) -> Point:
        width = self.axes.width - self.left - self.right
        height = self.axes.height - self.top - self.bottom
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(self.left + across * width, 1), round(self.top + (1 - up) * height, 1)


def categorical(index: int) -> str:
    """The colour of the index-th thing of a few: 0 is grey, for the one that others are compared with."""
    return f"var(--s{index % 8})"


def sequential(index: int, count: int) -> str:
    """The colour of the index-th of `count` things that have an order, as layers do."""
    share = (index + 1) / count if count > 1 else 0.6
    return f"var(--h{round((0.25 + 0.75 * share) * (HEAT_STEPS - 1))})"


def heat_css() -> str:
    """The colour scale `--h0` ... `--h23`, for light and for dark pages."""
    light = "".join(f"--h{step}:{_mix(_LIGHT, step / (HEAT_STEPS - 1))};" for step in range(HEAT_STEPS))
    dark = "".join(f"--h{step}:{_mix(_DARK, step / (HEAT_STEPS - 1))};" for step in range(HEAT_STEPS))
    cells = "".join(f".c{step}{{fill:var(--h{step})}}" for step in range(HEAT_STEPS))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{cells}"


def _mix(stops: Sequence[str], share: float) -> str:
    position = share * (len(stops) - 1)
    first = min(int(position), len(stops) - 2)
    low, high = (bytes.fromhex(stops[i].removeprefix("#")) for i in (first, first + 1))
    mixed = (round(a + (b - a) * (position - first)) for a, b in zip(low, high, strict=True))
    return "#" + bytes(mixed).hex()


def line_chart(lines: Sequence[Line], axes: Axes) -> str:
    """Curves over a common x axis, with tooltips."""
    drawn = [line for line in lines if line.finite]
    if not drawn:
        return '<p class="note">nothing was recorded</p>'
    xs = [x for line in drawn for x, _ in line.finite] + [x for x, _ in axes.x_guides]
    ys = [y for line in drawn for _, y in line.finite] + [y for y, _ in axes.y_guides]
    frame = Frame(padded(xs, 0), axes.y_range or padded(ys, 0.06), axes)
    many = sum(len(line.finite) for line in drawn) > _MANY_POINTS
    body = [*grid_lines(frame), *guide_lines(frame)]
    body += [mark for line in drawn for mark in _curve(frame, line, many)]
    style = "min-width:580px" if axes.width > 580 else ""  # scrolls on a phone rather than shrinks
    return picture(axes.width, axes.height, body, axes.y_label or "chart", style)


def _curve(frame: Frame, line: Line, many: bool) -> Iterable[str]:
    places = [frame.at(x, y) for x, y in line.finite]
    path = " ".join(f"{x},{y}" for x, y in places)
    kind = "curve" + " bold" * line.bold + " dashed" * line.dashed
    last = f"{line.label}: {line.finite[-1][1]:.4g}"
    title = f"<title>{escape(last)}</title>"
    yield f'<polyline class="{kind}" style="stroke:{line.colour}" points="{path}">{title}</polyline>'
    shown = list(zip(line.finite, places, strict=True))
    for index, ((x, y), (left, top)) in enumerate(shown[-1:] if many else shown):
        is_end = line.final and (many or index == len(shown) - 1)
        kind, radius = ("end", 5) if is_end else ("hover", 5) if len(shown) > _DENSE else ("point", 2.2)
        title = f"<title>{escape(f'{line.label}: {y:.4g} at {frame.axes.x_label} {x:.4g}')}</title>"
        yield f'<circle class="{kind}" cx="{left}" cy="{top}" r="{radius}" style="fill:{line.colour}">{title}</circle>'


def grid_lines(frame: Frame) -> Iterable[str]:
    """Horizontal lines, tick labels and the names of the axes."""
    axes, (left, bottom) = frame.axes, frame.at(frame.x[0], frame.y[0])
    right = axes.width - frame.right
    for value in ticks(*frame.y):
        y = frame.at(frame.x[0], value)[1]
        yield f'<line class="grid-line" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{left - 7}" y="{y + 4}" text-anchor="end">{value:.4g}</text>'
    yield f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    for value in ticks(*frame.x, count=6):
        x = frame.at(value, frame.y[0])[0]
        yield f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{value:.4g}</text>'
    yield f'<text x="{right}" y="{axes.height - 4}" text-anchor="end">{escape(axes.x_label)} →</text>'
    if axes.y_label:
        yield f'<text x="4" y="{axes.height - 4}">↑ {escape(axes.y_label)}</text>'


def guide_lines(frame: Frame) -> Iterable[str]:
    for value, word in frame.axes.y_guides:
        (left, y), right = frame.at(frame.x[0], value), frame.axes.width - frame.right
        yield f'<line class="guide" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{left + 4}" y="{y - 4}">{escape(word)}</text>'
    for index, (value, word) in enumerate(frame.axes.x_guides):
        x, bottom = frame.at(value, frame.y[0])
        yield f'<line class="guide" x1="{x}" x2="{x}" y1="{frame.top}" y2="{bottom}"/>'
        yield f'<text x="{x + 4}" y="{bottom - 6 - 14 * index}">{escape(word)}</text>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers in [low, high]."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if raw <= factor * unit * 1.001)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):  # one value: give it room
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    return low - share * (high - low), high + share * (high - low)


def heat_map(
    rows: Sequence[tuple[int, Sequence[float]]], targets: Collection[tuple[int, int]], name: str
) -> str:
    """Layers down, experts across, darker for a higher value; `targets` are outlined.

    Args:
        rows: (layer, one value per expert).
        targets: (layer, expert) pairs.
        name: what a value is, for the tooltips.
    """
    columns = max(len(values) for _, values in rows)
    across = max(3.6, min(58.0, 980 / columns))
    down = 32.0 if len(rows) <= 12 else 14.0 if len(rows) <= 40 else 11.0
    top = max((v for _, values in rows for v in values if math.isfinite(v)), default=0.0) or 1.0
    body = [*_cells(rows, across, down, top, escape(name)), *_heat_labels(rows, columns, across, down)]
    index = {layer: position for position, (layer, _) in enumerate(rows)}
    for layer, expert in targets:
        if layer in index:
            x, y = 40 + expert * across, 4 + index[layer] * down
            box = f'x="{x - 1:.2f}" y="{y - 1:.2f}" width="{across + 1.2:.2f}" height="{down + 1.2:.2f}"'
            title = f"<title>target: layer {layer}, expert {expert}</title>"
            body.append(f'<rect class="target" rx="2" {box} pointer-events="none">{title}</rect>')
    width, height = math.ceil(44 + columns * across), math.ceil(28 + len(rows) * down)
    return picture(
        width, height, body, f"{name} of every expert", f"min-width:{min(width, 620)}px;max-width:{width}px"
    )


def _cells(
    rows: Sequence[tuple[int, Sequence[float]]], across: float, down: float, top: float, name: str
) -> Iterable[str]:
    gap = 0.4 if across < 8 else 1.2
    size = f'width="{across - gap:.2f}" height="{down - gap:.2f}"'
    for position, (layer, values) in enumerate(rows):
        yield f'<g transform="translate(40 {4 + position * down:g})">'
        for expert, value in enumerate(values):
            share = min(max(value / top, 0.0), 1.0) if math.isfinite(value) else 0.0
            title = f"<title>layer {layer} expert {expert}: {name} {value:.5g}</title>"
            yield f'<rect class="c{round(share * (HEAT_STEPS - 1))}" x="{expert * across:.5g}" {size}>{title}</rect>'
        yield "</g>"


def _heat_labels(
    rows: Sequence[tuple[int, Sequence[float]]], columns: int, across: float, down: float
) -> Iterable[str]:
    every_row = 1 if down >= 14 else 2
    for position, (layer, _) in enumerate(rows):
        if position % every_row == 0:
            yield f'<text x="34" y="{4 + (position + 0.5) * down + 4:g}" text-anchor="end">{layer}</text>'
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if step * across >= 24)
    bottom = 4 + len(rows) * down + 16
    for expert in range(0, columns, every):
        yield f'<text x="{40 + (expert + 0.5) * across:g}" y="{bottom:g}" text-anchor="middle">{expert}</text>'


def track(before: float, after: float, mark: float | None) -> str:
    """A line from 0 to 1 with the way from `before` (ring) to `after` (dot), and a tick at `mark`."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return ""
    start, end = (8 + 144 * min(max(value, 0.0), 1.0) for value in (before, after))
    body = ['<line class="track" x1="8" x2="152" y1="10" y2="10"/>']
    body.append(f'<line class="change" x1="{start:.1f}" x2="{end:.1f}" y1="10" y2="10"/>')
    if mark is not None:
        x = 8 + 144 * mark
        body.append(f'<line class="tick" x1="{x:g}" x2="{x:g}" y1="2" y2="18"><title>chance</title></line>')
    body.append(f'<circle class="start" cx="{start:.1f}" cy="10" r="5"/>')
    body.append(f'<circle class="dot" cx="{end:.1f}" cy="10" r="6"/>')
    return picture(160, 20, body, f"from {before:.3f} to {after:.3f}", "max-width:220px")


def picture(width: int, height: int, body: Iterable[str], label: str, style: str = "") -> str:
    attribute = f' style="{style}"' if style else ""
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"{attribute}>'
    return f"{head}{''.join(body)}</svg>"
