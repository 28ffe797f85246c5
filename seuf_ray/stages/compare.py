"""The comparison: every variant of `[[compare]]` trained and evaluated like the job itself, in one table."""

from __future__ import annotations

from seuf_ray.artifacts import (
    AttributionReport,
    Comparison,
    ComparisonRow,
    CurvePoint,
    EvaluationReport,
    UnlearningPlan,
    provenance,
)
from seuf_ray.console import heading, progress_printer, show_plan
from seuf_ray.evaluation import interpolate_utility
from seuf_ray.job import Job, derive_variant
from seuf_ray.outputs import AFTER, EVERYTHING, PLAN, claim, read_metrics
from seuf_ray.stages.evaluate import evaluate
from seuf_ray.stages.plan import plan
from seuf_ray.stages.unlearn import unlearn

MATCHED_LEVEL = 0.4


def compare(job: Job, report: AttributionReport, before: EvaluationReport) -> Comparison:
    """Train what `[[compare]]` lists and write `comparison.json`; the job's own run is its second row."""
    rows = [_original(before), summarize_run(job, job.config.name)]
    for variant in job.config.compare:
        heading(f"compare: {variant.name}")
        rows.append(run_variant(job, variant.name, report))
    comparison = Comparison(
        model=job.identity,
        provenance=provenance(
            job.config.seed, attribution=report.fingerprint, model=job.identity.fingerprint
        ),
        forget=job.config.data.forget,
        matched_level=MATCHED_LEVEL,
        rows=rows,
    )
    comparison.write(job.path("comparison.json"))
    return comparison


def run_variant(job: Job, name: str, report: AttributionReport) -> ComparisonRow:
    """Plan, unlearn and evaluate one variant in its own folder."""
    other = Job(derive_variant(job.config, name))
    claim(other.config, *EVERYTHING)
    targets = plan(other, report)
    show_plan(targets)
    folder = unlearn(other, targets, progress_printer(other.config.training.steps))
    evaluate(other, folder)
    return summarize_run(other, name)


def summarize_run(job: Job, name: str) -> ComparisonRow:
    """A row from the artifacts of a finished run."""
    after = job.read(EvaluationReport, AFTER)
    targets = job.read(UnlearningPlan, PLAN)
    metrics = read_metrics(job)
    curve = [
        CurvePoint(step=int(m["step"]), forget_accuracy=m["forget_accuracy"], utility=m["utility"])
        for m in metrics
    ]
    return ComparisonRow(
        name=name,
        forget_accuracy=after.forget_accuracy,
        utility=after.utility_accuracy,
        perplexity=after.perplexity,
        overlap_top1=after.drift("overlap_top1", "forget"),
        kl=after.drift("kl", "forget"),
        trainable_fraction=targets.trainable_fraction,
        steps=curve[-1].step,
        seconds=metrics[-1].get("seconds"),
        curve=curve,
        utility_at_forget=interpolate_utility(curve, MATCHED_LEVEL),
    )


def _original(before: EvaluationReport) -> ComparisonRow:
    return ComparisonRow(
        name="original",
        forget_accuracy=before.forget_accuracy,
        utility=before.utility_accuracy,
        perplexity=before.perplexity,
        overlap_top1=None,
        kl=None,
        trainable_fraction=None,
        steps=None,
        seconds=None,
        curve=[],
        utility_at_forget=None,
    )
