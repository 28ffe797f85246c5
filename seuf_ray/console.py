"""What a job says on the terminal while it works."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

from seuf_ray.artifacts import AttributionReport, EvaluationReport, UnlearningPlan
from seuf_ray.unlearning import Progress

_started = time.perf_counter()


def heading(text: str) -> None:
    """`[ 12.3 s] text`: a stage begins."""
    print(f"\n[{time.perf_counter() - _started:6.1f} s] {text}", flush=True)


def show_attribution(report: AttributionReport) -> None:
    """The leading experts, and the warnings."""
    data = report.data
    print(f"  {data.num_tokens:,} forget tokens in {data.num_rows:,} rows from {', '.join(data.sources)}")
    ranked = report.ranked()
    for (score, (layer, expert)), (following, _) in pairwise(ranked[:6]):
        lead = f"{score / following:.2f} x the next" if following else ""
        print(f"  layer {layer:2d} expert {expert:3d}   {report.score} {score:.4f}   {lead}")
    for warning in report.warnings:
        print(f"  WARNING: {warning}")


def show_plan(plan: UnlearningPlan) -> None:
    """What will train, and how much of the model that is."""
    what = (
        "every parameter"
        if plan.is_full
        else ", ".join(f"layer {at} expert {e}" for at, e in plan.experts[:8])
    )
    more = f" and {len(plan.experts) - 8} more" if len(plan.experts) > 8 else ""
    routers = f", {len(plan.routers)} router(s)" if plan.routers and not plan.is_full else ""
    print(
        f"  {what}{more}{routers}: {plan.num_trainable:,} of {plan.model.num_parameters:,} parameters", end=""
    )
    print(f" ({plan.trainable_fraction:.4%} trainable)", flush=True)


def progress_printer(steps: int) -> Callable[[Progress], None]:
    """A listener that prints one line per small evaluation."""

    def show(progress: Progress) -> None:
        metrics = progress.metrics
        terms = "  ".join(
            f"{k.removeprefix('loss/')} {v:+.3f}" for k, v in metrics.items() if k.startswith("loss/")
        )
        kept = [v for k, v in metrics.items() if k.startswith("overlap_top1/forget/")]
        drift = f"overlap {sum(kept) / len(kept):.3f}" if kept else ""
        print(
            f"  step {progress.step:4d}/{steps}  forget {metrics.get('forget_accuracy', float('nan')):.3f}  "
            f"utility {metrics.get('utility', float('nan')):.3f}  {drift}  {terms}",
            flush=True,
        )
        if progress.stopped:
            print(f"  stopped: {progress.stopped}", flush=True)

    return show


def show_evaluation(report: EvaluationReport) -> None:
    """Headline figures, and every question source."""
    print(
        f"  forget accuracy {report.forget_accuracy:.3f}   utility {report.utility_accuracy:.3f}   "
        f"perplexity {report.perplexity:.1f}"
    )
    if report.patch is not None:
        overlap, kl = report.drift("overlap_top1", "forget"), report.drift("kl", "forget")
        print(f"  routing on forget tokens: top-1 overlap {overlap:.3f}, KL {kl:.4f} nats per token")
    for source, found in {**report.forget, **report.utility}.items():
        print(f"    {source:32s} {found.mean:.3f}  of {found.count:.0f}", flush=True)
