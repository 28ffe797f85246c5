"""How training went, and where routing drifted on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seuf_ray.artifacts import EvaluationReport, UnlearningPlan
from seuf_ray.report import charts, markup
from seuf_ray.report.charts import Axes, Line
from seuf_ray.report.numbers import CHANCE, DRIFTS, SETS, DataSet, Drift, layers_table

FEW_LAYERS = 8

Metrics = Sequence[Mapping[str, float]]


def _series(metrics: Metrics, key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in metrics if key in record and "step" in record]


def training(metrics: Metrics) -> str:
    forget = Line("forget accuracy", _series(metrics, "forget_accuracy"), charts.categorical(2), final=True)
    utility = Line("utility", _series(metrics, "utility"), charts.categorical(1), final=True)
    axes = Axes(y_label="accuracy", y_range=(0.0, 1.0), y_guides=[(CHANCE, "chance")], width=940, height=260)
    curves = markup.figure(
        "Forgetting and what it costs",
        charts.line_chart([forget, utility], axes),
        [(line.colour, line.label) for line in (forget, utility)],
        "Small evaluations during training, on fewer questions than the tables below.",
    )
    terms = sorted({key for record in metrics for key in record if key.startswith("loss/")})
    keys = [(key, key.replace("/", ": ")) for key in terms] + [("grad_norm", "gradient norm")]
    small = [
        markup.figure(
            title,
            charts.line_chart(
                [Line(title, _series(metrics, key), charts.categorical(1))], Axes(width=330, height=190)
            ),
        )
        for key, title in keys
    ]
    text = "The loss is the sum of its terms; each has its own scale here."
    note = markup.paragraph(text, "note")
    return markup.section("Training", curves, f'<div class="grid">{"".join(small)}</div>', note)


def routing(metrics: Metrics, plan: UnlearningPlan, after: EvaluationReport) -> str:
    text = (
        "If unlearning succeeds by sending tokens to other experts, the knowledge stays where it was. These curves say "
        "how far each layer's routing moved from the original model's; thick lines are the layers whose router trained."
    )
    pictures = [_drift_chart(metrics, plan, name, title, data) for name, title in DRIFTS for data in SETS]
    pictures += _target_chart(metrics)
    layers = sorted(
        {layer for name, _ in DRIFTS for data in SETS for layer in getattr(after, name).get(data, {})}
    )
    final = markup.details("Every layer after training", layers_table(after, layers), len(layers) <= 12)
    return markup.section(
        "Routing", markup.paragraph(text, "soft"), f'<div class="grid wide">{"".join(pictures)}</div>', final
    )


def _drift_chart(metrics: Metrics, plan: UnlearningPlan, name: Drift, title: str, data: DataSet) -> str:
    layers = _layers(metrics, [name, data])
    lines = [
        Line(
            f"layer {layer}{', trained' * _is_trained(plan, layer)}",
            _series(metrics, f"{name}/{data}/{layer}"),
            charts.sequential(index, len(layers)),
            bold=_is_trained(plan, layer),
        )
        for index, layer in enumerate(layers)
    ]
    shown = [
        line
        for i, line in enumerate(lines)
        if len(lines) <= FEW_LAYERS or i in (0, len(lines) - 1) or line.bold
    ]
    axes = Axes(y_range=_common_range(metrics, name), y_label="nats" if name == "kl" else "share")
    entries = [(line.colour, line.label) for line in shown[:FEW_LAYERS]]
    return markup.figure(f"{title}, {data} tokens", charts.line_chart(lines, axes), entries)


def _target_chart(metrics: Metrics) -> list[str]:
    """Where training recorded it: do the forget tokens still go to the experts that are being changed?"""
    layers = _layers(metrics, ["step", "target_tokens"])[:FEW_LAYERS]
    lines = []
    for index, layer in enumerate(layers):
        colour = charts.sequential(index, len(layers))
        now, before = (_series(metrics, f"step/target_tokens{end}/{layer}") for end in ("", "_ref"))
        lines.append(Line(f"layer {layer}", now, colour, bold=True))
        lines.append(Line(f"layer {layer}, original router", before, colour, dashed=True))
    title = "Training tokens on target experts"
    picture = charts.line_chart(lines, Axes(y_range=(0.0, 1.0), y_label="share"))
    entries = [(line.colour, line.label) for line in lines[::2]]
    caption = (
        "Forget tokens of the steps; dashed: the same tokens under the original router, where it was run."
    )
    return [markup.figure(title, picture, entries, caption)] if lines else []


def _layers(metrics: Metrics, head: list[str]) -> list[int]:
    """The layers that keys HEAD/LAYER speak of."""
    split = (key.split("/") for record in metrics for key in record)
    return sorted({int(parts[2]) for parts in split if parts[:2] == head})


def _is_trained(plan: UnlearningPlan, layer: int) -> bool:
    return layer in plan.routers and not plan.is_full


def _common_range(metrics: Metrics, name: Drift) -> tuple[float, float] | None:
    """One scale for forget and retain, so that they can be compared by eye."""
    values = [
        v for record in metrics for key, v in record.items() if key.startswith(f"{name}/") and abs(v) < 1e30
    ]
    if not values:
        return None
    if name == "kl":
        return 0.0, max(*values, 1e-9) * 1.06
    return min(*values, 0.95) - 0.02, 1.005
