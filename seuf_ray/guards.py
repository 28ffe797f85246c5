"""What must not happen during training, and which step's tensors are the result.

A guard compares a small evaluation with its limit. Violated, it ends the run: `stop` keeps the tensors as they
are, `rollback` goes back to the best step before. `keep = best` ends every run at its best step. "Best" is by
`metric`, among the steps that violate nothing; the untouched original (step 0) is one of them, so there is always
somewhere to go back to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seuf_ray.config import GuardsConfig
from seuf_ray.engine import Engine


class Keeper:
    """Watches the small evaluations of one run and holds the state of its best step."""

    def __init__(self, engine: Engine, config: GuardsConfig) -> None:
        self.engine, self.config = engine, config
        self._best: dict[str, Any] | None = None
        self._is_broken = False

    def judge(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Why the run must end, if a guard is violated; else remember the state where it is the best so far."""
        if (reason := self._violation(step, metrics)) is not None:
            return reason
        score = self._score(metrics)
        if self._best is None or score > self._best["score"]:
            self._best = {"step": step, "score": score, "engine": self.engine.state()}
        return None

    def finish(self, step: int, violated: str | None) -> int:
        """Put the result in place; returns the step it is from."""
        goes_back = violated is not None and (self.config.action == "rollback" or self._is_broken)
        if not (goes_back or self.config.keep == "best") or self._best is None:
            return step
        self.engine.load_state(self._best["engine"])
        return int(self._best["step"])

    def state(self) -> dict[str, Any] | None:
        """The best step so far, for a run that is interrupted."""
        return self._best

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from `state`."""
        self._best = state

    def _score(self, metrics: Mapping[str, float]) -> float:
        forget, utility = metrics["forget_accuracy"], metrics["utility"]
        return {"gap": utility - forget, "utility": utility, "forget_accuracy": -forget}[self.config.metric]

    def _violation(self, step: int, metrics: Mapping[str, float]) -> str | None:
        limits = self.config
        likelihoods = [value for name, value in metrics.items() if name.startswith("nll/")]
        if not all(map(math.isfinite, likelihoods)):
            self._is_broken = True  # every question is answered wrong now, which must not pass for forgetting
            return f"the weights are broken at step {step}: the NLL of texts is no number (rollback)"
        drift = 1.0 - _mean(metrics, "overlap_topk/forget/")
        kl = _mean(metrics, "kl/forget/")
        for name, value, limit, broken in (
            ("max_drift", drift, limits.max_drift, _over(drift, limits.max_drift)),
            ("max_kl", kl, limits.max_kl, _over(kl, limits.max_kl)),
            (
                "min_utility",
                metrics["utility"],
                limits.min_utility,
                _under(metrics["utility"], limits.min_utility),
            ),
        ):
            if broken:
                return (
                    f"guards.{name} = {limit:g} violated at step {step}: {value:.4f} ({self.config.action})"
                )
        return None


def _over(value: float, limit: float | None) -> bool:
    """NaN violates every limit."""
    return limit is not None and not value <= limit


def _under(value: float, limit: float | None) -> bool:
    return limit is not None and not value >= limit


def _mean(metrics: Mapping[str, float], prefix: str) -> float:
    """Over all MoE layers."""
    values = [value for name, value in metrics.items() if name.startswith(prefix)]
    return sum(values) / len(values) if values else float("nan")
