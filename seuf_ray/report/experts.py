"""Which experts carry the forget set: heat maps, and the strongest experts with how far to believe their rank."""

from __future__ import annotations

from collections.abc import Collection

from seuf_ray.artifacts import AttributionReport, Expert, LayerScores, UnlearningPlan
from seuf_ray.report import charts, markup
from seuf_ray.report.markup import number, percent, plain, word, written

TOP_EXPERTS = 10


def section(report: AttributionReport, plan: UnlearningPlan | None = None) -> str:
    """Heat maps of the score on forget and on retain text, and a table; `plan` marks what trains."""
    targets = plan.experts if plan else []
    retained = [(row.layer, _retained(row, report)) for row in report.layers if row.retain]
    text = (
        f"How much of the forget set's routing each expert carries ({_name(report)}; {report.num_experts} experts per "
        f"layer, {report.top_k} chosen for each token, {report.data.num_tokens:,} tokens; {report.engine})."
    )
    caption = "Layers from top to bottom, experts from left to right."
    return markup.section(
        "Where the knowledge is",
        markup.paragraph(text, "soft"),
        _heat(
            [(row.layer, row.values(report.score)) for row in report.layers], targets, _name(report), caption
        ),
        markup.details(
            "The same on retain text",
            _heat(
                retained,
                targets,
                f"retain {'affinity' if report.score == 'contrast' else _name(report)}",
                caption,
            ),
        )
        if retained
        else "",
        "<h3>Strongest experts</h3>",
        _experts(report, set(targets)),
    )


def _heat(rows: list[tuple[int, list[float]]], targets: Collection[Expert], name: str, caption: str) -> str:
    top = max((value for _, values in rows for value in values), default=0.0)
    few = charts.HEAT_STEPS // 2
    scale = "".join(f'<i class="heat" style="color:var(--h{2 * step})"></i>' for step in range(few))
    trained = '<li class="trained">▢ trained</li>' if targets else ""
    legend = f'<ul class="legend"><li>0 {scale} {written(top, plain)}</li>{trained}</ul>'
    return markup.figure("", legend + charts.heat_map(rows, targets, name), caption=caption)


def _name(report: AttributionReport) -> str:
    return report.score.replace("_", " ")


def _retained(row: LayerScores, report: AttributionReport) -> list[float]:
    """What the forget score is held against: the same on retain text (affinity, for contrast)."""
    assert row.retain is not None
    values: list[float] = getattr(row.retain, "affinity" if report.score == "contrast" else report.score)
    return values


def _experts(report: AttributionReport, targets: set[Expert]) -> str:
    """The best experts, and the targets wherever they rank."""
    layers = {row.layer: row for row in report.layers}
    ranked = report.ranked()
    rows: list[tuple[str, list[str]]] = []
    for rank, (value, expert) in enumerate(ranked):
        if rank >= TOP_EXPERTS and expert not in targets:
            continue
        layer, index = layers[expert[0]], expert[1]
        margin = value - ranked[rank + 1][0] if rank + 1 < len(ranked) else None
        stays = layer.stability[index] if layer.stability else None
        tag = "trained" if expert in targets else ""
        cells = [
            number(rank + 1, markup.count),
            word(f"layer {expert[0]}, expert {index}", "short", tag),
            number(value),
            number(_retained(layer, report)[index] if layer.retain else None),
            number(margin),
            number(stays, percent),
            markup.bar(value / (ranked[0][0] or 1.0)),
        ]
        rows.append(("", cells))
    retained = "affinity on retain text" if report.score == "contrast" else "on retain text"
    stays_in = f"stays a target ({report.scope}, top {report.top_m})"
    return markup.table(["rank", "expert", _name(report), retained, "margin to the next", stays_in, ""], rows)
