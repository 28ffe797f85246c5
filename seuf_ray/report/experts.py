"""Which experts carry the forget set: heat map and table."""

from __future__ import annotations

from seuf_ray.artifacts import AttributionReport, UnlearningPlan
from seuf_ray.report import charts, markup
from seuf_ray.report.markup import number, plain, word, written

TOP_EXPERTS = 10


def section(report: AttributionReport, plan: UnlearningPlan) -> str:
    name = report.score.replace("_", " ")
    rows = [(row.layer, getattr(row, report.score)) for row in report.layers]
    top = report.ranked()[0][0] if rows else 0.0
    few = charts.HEAT_STEPS // 2
    scale = "".join(f'<i class="heat" style="color:var(--h{2 * step})"></i>' for step in range(few))
    legend = (
        f'<ul class="legend"><li>0 {scale} {written(top, plain)}</li><li class="trained">▢ trained</li></ul>'
    )
    text = (
        f"How much of the forget set's routing each expert carries ({name}; {report.num_experts} experts per layer, "
        f"{report.top_k} chosen for each token, {report.data.num_tokens:,} tokens)."
    )
    picture = charts.heat_map(rows, plan.experts, name)
    caption = "Layers from top to bottom, experts from left to right."
    return markup.section(
        "Where the knowledge is",
        markup.paragraph(text, "soft"),
        markup.figure("", legend + picture, caption=caption),
        "<h3>Strongest experts</h3>",
        _experts(report, plan, name),
    )


def _experts(report: AttributionReport, plan: UnlearningPlan, name: str) -> str:
    """The best experts, and the targets wherever they rank."""
    ranked, targets = report.ranked(), set(plan.experts)
    rows: list[tuple[str, list[str]]] = []
    for rank, (value, expert) in enumerate(ranked):
        if rank >= TOP_EXPERTS and expert not in targets:
            continue
        margin = value - ranked[rank + 1][0] if rank + 1 < len(ranked) else None
        cells = [
            number(rank + 1, markup.count),
            word(f"layer {expert[0]}, expert {expert[1]}", "short", _tag(expert in targets)),
        ]
        cells += [number(value), number(margin), markup.bar(value / (ranked[0][0] or 1.0))]
        rows.append(("", cells))
    return markup.table(["rank", "expert", name, "margin to the next", ""], rows)


def _tag(is_target: bool) -> str:
    return "trained" if is_target else ""
