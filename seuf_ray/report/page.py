"""Artifacts -> one HTML page that needs nothing but itself: no script, no font, no picture from elsewhere.

The page says, in this order: what was forgotten and at what price, which experts carry the knowledge, how training
went, where routing drifted, every number before and after, the comparison, and what all of it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from seuf_ray import artifacts
from seuf_ray.artifacts import (
    Artifact,
    AttributionReport,
    Comparison,
    DataSummary,
    EvaluationReport,
    UnlearningPlan,
)
from seuf_ray.report import charts, curves, experts, markup, numbers
from seuf_ray.report import comparison as compare
from seuf_ray.report.markup import accuracy, number, percent, plain, word, written
from seuf_ray.report.numbers import CHANCE, drift


def write_report(
    path: Path,
    attribution: AttributionReport,
    plan: UnlearningPlan,
    metrics: list[dict[str, float]],
    before: EvaluationReport,
    after: EvaluationReport,
    comparison: Comparison | None = None,
    job: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page of one run.

    Args:
        path: where to; written aside and renamed.
        attribution, plan, before, after: what the stages left.
        metrics: flat records of the training, as in `{"step": 10, "loss/forget": -3.2, "kl/retain/3": 0.1}`; any key
            may be missing in any of them.
        comparison: the tables over several variants, if there are any.
        job: the configuration (as JSON gives it), which names algorithm and anchor.
    """
    parts = [
        _header(attribution, plan, job or {}),
        _warnings(attribution.warnings),
        _ending(metrics),
        _headline(plan, before, after),
        experts.section(attribution, plan),
        curves.training(metrics),
        curves.routing(metrics, plan, after),
        numbers.section(before, after),
        compare.section(comparison) if comparison else "",
        _provenance(
            [attribution, plan, before, after, *([comparison] if comparison else [])], attribution, job
        ),
    ]
    artifacts.write_text(path, markup.page(_title(attribution), style(), "\n".join(filter(None, parts))))
    return path


def write_attribution_page(path: Path, attribution: AttributionReport) -> Path:
    """Write the page of an attribution by itself: warnings, heat maps, strongest experts."""
    facts = [("model", attribution.model.name), ("family", attribution.model.model_type)]
    facts += [("score", attribution.score), ("seed", str(attribution.provenance.seed))]
    parts = [
        masthead("Attribution report", f"What carries {', '.join(attribution.data.sources[:3])}", facts),
        _warnings(attribution.warnings),
        experts.section(attribution),
        _provenance([attribution], attribution, None),
    ]
    artifacts.write_text(path, markup.page(_title(attribution), style(), "\n".join(filter(None, parts))))
    return path


def style() -> str:
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8") + charts.heat_css()


def console_table(comparison: Comparison) -> str:
    """The comparison's two tables for a terminal."""
    return compare.console(comparison)


def _title(attribution: AttributionReport) -> str:
    sources = attribution.data.sources
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    return f"Forgetting {', '.join(sources[:3])}{more}"


def _header(attribution: AttributionReport, plan: UnlearningPlan, job: Mapping[str, Any]) -> str:
    facts = [("model", attribution.model.name), ("family", attribution.model.model_type)]
    facts += [(kind, _plugin(job[kind])) for kind in ("algorithm", "anchor") if kind in job]
    facts += [("targets", f"{plan.scope}, top {plan.top_m}"), ("seed", str(plan.provenance.seed))]
    return masthead("Unlearning report", _title(attribution), facts)


def masthead(kind: str, title: str, facts: Sequence[tuple[str, str]]) -> str:
    return f'<header><p class="eyebrow">{kind}</p><h1>{escape(title)}</h1>{markup.chips(facts)}</header>'


def _plugin(value: Any) -> str:
    """`npo (beta 0.1)`."""
    values = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = str(values.pop("name", "?"))
    rest = ", ".join(f"{key} {item}" for key, item in values.items())
    return f"{name} ({rest})" if rest else name


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return (
        f'<div class="warning" role="alert"><b>Before you trust this</b><ul>{items}</ul></div>'
        if items
        else ""
    )


def _ending(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Why training ended early, and which step's tensors are the result; nothing for a run of all its steps."""
    last = metrics[-1] if metrics else {}
    if not last.get("stopped"):
        return ""
    kept = f" The patch holds the tensors of step {last['kept']}." if "kept" in last else ""
    return f'<div class="warning"><b>Training ended early</b><p>{escape(str(last["stopped"]) + "." + kept)}</p></div>'


def _headline(plan: UnlearningPlan, before: EvaluationReport, after: EvaluationReport) -> str:
    forget, utility = (
        (before.forget_accuracy, after.forget_accuracy),
        (before.utility_accuracy, after.utility_accuracy),
    )
    sentence = (
        f"Accuracy on what is to be forgotten went from {written(forget[0], accuracy)} "
        f"to {written(forget[1], accuracy)}, where guessing gives {CHANCE}; on everything else from "
        f"{written(utility[0], accuracy)} to {written(utility[1], accuracy)}. {_what_trained(plan)}"
    )
    overlap, kl = drift(after, "overlap_top1", "forget"), drift(after, "kl", "forget")
    tiles = [
        _accuracy_tile("Forget accuracy", *forget, f"chance {CHANCE}", CHANCE),
        _accuracy_tile("Utility", *utility, written(utility[1] - utility[0], markup.change), None),
        markup.tile(
            "Perplexity",
            written(after.perplexity, plain),
            f"from {written(before.perplexity, plain)}, on retained text",
        ),
        markup.tile("Routing kept", written(overlap, accuracy), "first choices of forget tokens"),
        markup.tile("Routing KL", written(kl, plain), "nats per forget token"),
        markup.tile("Trained", percent(plan.trainable_fraction), f"{plan.num_trainable:,} parameters"),
    ]
    return f'{markup.paragraph(sentence, "lead")}<div class="tiles">{"".join(tiles)}</div>'


def _accuracy_tile(name: str, before: float, after: float, remark: str, mark: float | None) -> str:
    below = f"from {written(before, accuracy)} · {remark}"
    return markup.tile(name, written(after, accuracy), below, charts.track(before, after, mark))


def _what_trained(plan: UnlearningPlan) -> str:
    share = f"{percent(plan.trainable_fraction)} of the model"
    if plan.is_full:
        return f"Every parameter trained ({share})."
    experts = ", ".join(f"{expert} of layer {layer}" for layer, expert in plan.experts[:4])
    more = f" and {len(plan.experts) - 4} more" if len(plan.experts) > 4 else ""
    routers = f"{len(plan.routers)} router{'s' * (len(plan.routers) != 1)}"
    return f"Only expert {experts}{more} and {routers} trained: {share}."


def _texts(data: DataSummary) -> str:
    first = f", the first {data.first_bad}" if data.num_bad_rows else ""
    return f"{data.num_texts:,} in {data.num_rows:,} rows, {data.num_bad_rows:,} malformed{first}"


def _provenance(
    records: Sequence[Artifact], attribution: AttributionReport, job: Mapping[str, Any] | None
) -> str:
    rows = []
    for record, label in zip(records, ("attribution", "plan", "before", "after", "comparison"), strict=False):
        made_from = ", ".join(f"{name} {value[:12]}" for name, value in record.provenance.made_from.items())
        cells = [
            word(label),
            word(record.fingerprint, "mono"),
            number(record.provenance.seed, str),
            word(made_from, "mono"),
        ]
        rows.append(("", cells))
    packages = sorted({pair for record in records for pair in record.provenance.packages.items()})
    model, sets = attribution.model, (("forget", attribution.data), ("retain", attribution.retain))
    facts = [
        ("model", f"{model.name} {model.revision or ''}".strip()),
        ("parameters", f"{model.num_parameters:,}"),
        ("model fingerprint", model.fingerprint),
        ("statistics", attribution.digest),
        ("attributed by", attribution.engine),
        *((f"{name} texts", _texts(data)) for name, data in sets if data is not None),
    ]
    return markup.section(
        "Made from",
        markup.chips(facts),
        markup.table(["artifact", "fingerprint", "seed", "made from"], rows),
        "<br>",
        markup.chips(packages),
        markup.details("The job", f"<pre>{escape(json.dumps(job, indent=2))}</pre>") if job else "",
    )
