"""What a model knows and how it routes, and several of them side by side."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from seuf_ray.artifacts.record import Artifact, Record, Statistic


class EvaluationReport(Artifact):
    """Forget accuracy, utility, perplexity and routing drift, all as (sum, count)."""

    kind: Literal["evaluation"] = "evaluation"
    patch: str | None = Field(description="fingerprint of the patch evaluated, None for the original")
    forget: dict[str, Statistic] = Field(description="question source -> correct answers")
    utility: dict[str, Statistic]
    nll: Statistic = Field(description="summed token NLL on the perplexity texts")
    overlap_top1: dict[str, dict[int, Statistic]] = Field(
        description="set -> layer -> unchanged first choices"
    )
    overlap_topk: dict[str, dict[int, Statistic]] = Field(
        description="set -> layer -> unchanged top-k choices"
    )
    kl: dict[str, dict[int, Statistic]] = Field(
        description="set -> layer -> KL(original || current), nats per token"
    )

    @property
    def forget_accuracy(self) -> float:
        """Mean over sources (4 choices: chance is 0.25)."""
        return _mean([s.mean for s in self.forget.values()])

    @property
    def utility_accuracy(self) -> float:
        """Unweighted mean over the other domains."""
        return _mean([s.mean for s in self.utility.values()])

    @property
    def perplexity(self) -> float:
        return float(2.718281828459045 ** min(self.nll.mean, 700.0))

    def drift(
        self, name: Literal["overlap_top1", "overlap_topk", "kl"], data: Literal["forget", "retain"]
    ) -> float:
        """A routing figure over all MoE layers."""
        rows = getattr(self, name)[data].values()
        return float(sum(s.sum for s in rows) / max(sum(s.count for s in rows), 1))


class CurvePoint(Record):
    """A small evaluation on the way."""

    step: int
    forget_accuracy: float
    utility: float


class ComparisonRow(Record):
    """One variant of the comparison; the first row is the untouched original."""

    name: str
    forget_accuracy: float
    utility: float
    perplexity: float
    overlap_top1: float | None = Field(description="on forget tokens, all MoE layers; None for the original")
    kl: float | None = Field(description="on forget tokens, nats per token")
    trainable_fraction: float | None
    steps: int | None
    seconds: float | None = Field(description="of training, without start-up and evaluation")
    curve: list[CurvePoint]
    utility_at_forget: float | None = Field(
        description="interpolated where forget accuracy first falls to the level"
    )


class Comparison(Artifact):
    """The demo's two tables: after a fixed number of steps, and at matched forgetting."""

    kind: Literal["comparison"] = "comparison"
    forget: list[str]
    matched_level: float = 0.4
    rows: list[ComparisonRow]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
