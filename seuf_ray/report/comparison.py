"""The comparison of variants: two tables and a plot, as a section of the report and as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from seuf_ray.artifacts import Comparison, ComparisonRow
from seuf_ray.report import charts, markup
from seuf_ray.report.charts import Axes, Line
from seuf_ray.report.markup import accuracy, count, number, percent, plain, word, written
from seuf_ray.report.numbers import CHANCE

Column = tuple[str, Callable[[ComparisonRow], float | None], markup.Format]

COLUMNS: tuple[Column, ...] = (
    ("forget accuracy", lambda row: row.forget_accuracy, accuracy),
    ("utility", lambda row: row.utility, accuracy),
    ("perplexity", lambda row: row.perplexity, plain),
    ("first choice kept", lambda row: row.overlap_top1, accuracy),
    ("KL", lambda row: row.kl, plain),
    ("trained", lambda row: row.trainable_fraction, percent),
    ("steps", lambda row: row.steps, count),
    ("seconds", lambda row: row.seconds, plain),
)


def section(comparison: Comparison) -> str:
    """The section of the page."""
    level = f"{comparison.matched_level:g}"
    fixed = "After a fixed number of steps every variant has forgotten a different amount, so utilities do not compare."
    matched = (
        f"Utility where forget accuracy first falls to {level}: the same amount forgotten by all. From the small "
        "evaluations during training, so compare within this table."
    )
    return markup.section(
        "Comparison",
        "<h3>After training</h3>",
        markup.paragraph(fixed, "soft"),
        _fixed(comparison.rows),
        "<h3>At matched forgetting</h3>",
        markup.paragraph(matched, "soft"),
        _matched(comparison),
        _plot(comparison),
    )


def _fixed(rows: Sequence[ComparisonRow]) -> str:
    head = ["variant", *(name for name, _, _ in COLUMNS)]
    return markup.table(
        head,
        [
            ("muted" * (index == 0), [word(row.name), *(number(get(row), form) for _, get, form in COLUMNS)])
            for index, row in enumerate(rows)
        ],
    )


def _matched(comparison: Comparison) -> str:
    """All from the small evaluations during training: the full ones have other questions and do not compare."""
    variants = comparison.rows[1:]
    best = max((row.utility_at_forget for row in variants if row.utility_at_forget is not None), default=None)
    rows = []
    for row in variants:
        start, value = row.curve[0].utility if row.curve else None, row.utility_at_forget
        is_best = value is not None and value == best and len(variants) > 1
        lost = None if value is None or start is None else value - start
        there = word("not reached", "n") if value is None else number(value, accuracy, is_best)
        rows.append(("", [word(row.name), number(start, accuracy), there, number(lost, markup.change)]))
    head = ["variant", "utility at the start", f"utility at {comparison.matched_level:g}", "change"]
    return markup.table(head, rows)


def _plot(comparison: Comparison) -> str:
    lines = [
        Line(
            row.name,
            [(point.forget_accuracy, point.utility) for point in row.curve],
            charts.categorical(index),
            dashed=index >= 8,
            final=True,
        )
        for index, row in enumerate(comparison.rows)
    ]
    guides = [(CHANCE, "chance"), (comparison.matched_level, "matched")]
    lowest = min((y for line in lines for _, y in line.finite), default=0.0)
    y_range = (max(math.floor(lowest * 10 - 0.5) / 10, 0.0), 1.0)
    axes = Axes("forget accuracy", "utility", y_range, x_guides=guides, width=940, height=380)
    caption = "Training moves to the left; better is up. The large dot is where it ended."
    entries = [(line.colour, line.label) for line in lines if line.finite]
    return markup.figure("Utility against forgetting", charts.line_chart(lines, axes), entries, caption)


def console(comparison: Comparison) -> str:
    """Both tables for a terminal."""
    head = ["variant", *(name for name, _, _ in COLUMNS)]
    rows = [[row.name, *(written(get(row), form) for _, get, form in COLUMNS)] for row in comparison.rows]
    matched = [[row.name, written(row.utility_at_forget, accuracy)] for row in comparison.rows[1:]]
    level = f"{comparison.matched_level:g}"
    return "\n".join(
        [
            "After training:",
            markup.aligned(head, rows),
            "",
            f"Where forget accuracy first falls to {level}:",
            markup.aligned(["variant", "utility"], matched),
        ]
    )
