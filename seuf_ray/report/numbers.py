"""Every number before and after, and every layer's routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from seuf_ray.artifacts import EvaluationReport, Statistic
from seuf_ray.report import markup
from seuf_ray.report.markup import accuracy, number, plain, signed, word

CHANCE = 0.25  # of four choices

DataSet = Literal["forget", "retain"]
Drift = Literal["overlap_top1", "overlap_topk", "kl"]
DRIFTS: tuple[tuple[Drift, str], ...] = (
    ("overlap_top1", "first choice kept"),
    ("overlap_topk", "top-k choices kept"),
    ("kl", "KL to the original routing"),
)
SETS: tuple[DataSet, ...] = ("forget", "retain")


def drift(report: EvaluationReport, name: Drift, data: DataSet) -> float:
    return report.drift(name, data) if getattr(report, name).get(data) else float("nan")


def section(before: EvaluationReport, after: EvaluationReport) -> str:
    rows = [_mean_row("forget accuracy", before.forget_accuracy, after.forget_accuracy)]
    rows += _source_rows(before.forget, after.forget)
    rows += [_mean_row("utility", before.utility_accuracy, after.utility_accuracy)]
    rows += _source_rows(before.utility, after.utility)
    perplexities = [
        number(before.perplexity),
        number(after.perplexity),
        number(after.perplexity - before.perplexity, signed),
    ]
    rows += [("strong", [word("perplexity"), *perplexities, number(after.nll.count, markup.count)])]
    for data in SETS:
        for name, title in DRIFTS:
            values, form = (
                [drift(report, name, data) for report in (before, after)],
                plain if name == "kl" else accuracy,
            )
            n = sum(s.count for s in getattr(after, name).get(data, {}).values())
            cells = [*(number(value, form) for value in values), number(None), number(n, markup.count)]
            rows.append(("", [word(f"{title}, {data} tokens"), *cells]))
    return markup.section("Before and after", markup.table(["", "before", "after", "change", "n"], rows))


def _mean_row(name: str, before: float, after: float) -> tuple[str, list[str]]:
    cells = [
        word(name),
        number(before, accuracy),
        number(after, accuracy),
        number(after - before, markup.change),
    ]
    return "strong", [*cells, number(None)]


def _source_rows(
    before: Mapping[str, Statistic], after: Mapping[str, Statistic]
) -> list[tuple[str, list[str]]]:
    rows = []
    for source in [*before, *(name for name in after if name not in before)]:
        first, last = (
            report[source].mean if source in report else float("nan") for report in (before, after)
        )
        cells = [number(first, accuracy), number(last, accuracy), number(last - first, markup.change)]
        n = (after.get(source) or before[source]).count
        rows.append(("", [word(source, "name indent"), *cells, number(n, markup.count)]))
    return rows


def layers_table(after: EvaluationReport, layers: Sequence[int]) -> str:
    head = ["layer", *(f"{data}: {title}" for data in SETS for title in ("first choice", "top-k", "KL"))]
    rows = []
    for layer in layers:
        cells = [number(layer, markup.count)]
        for data in SETS:
            for name, _ in DRIFTS:
                statistic = getattr(after, name).get(data, {}).get(layer)
                cells.append(
                    number(statistic.mean if statistic else None, plain if name == "kl" else accuracy)
                )
        rows.append(("", cells))
    return markup.table(head, rows)
