"""ASHA's early stopping, made repeatable: a trial is compared with trials that were over before it began.

    rungs   steps r, r eta, r eta^2, ... below the trial's last step
    cut     the score that the best 1 / eta of the known trials reached at that rung

A trial under the cut at a rung ends there. Differs from ASHA (arXiv 1810.05934) in whom it compares with: not whoever
happens to have arrived, but trials up to a fixed distance before it, so the decision depends on no clock. Tune's
scheduler would decide by arrival; where two trials run at once, a search that is repeated would end otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from seuf_ray.artifacts import TrialRecord
from seuf_ray.config import SearchConfig
from seuf_ray.search import objectives

Cuts = dict[int, float]  # rung (a step) -> score under which a trial ends


def rungs(config: SearchConfig, most_steps: int) -> list[int]:
    """The steps at which trials may end."""
    found, step = [], config.grace_steps
    while step < most_steps:
        found.append(step)
        step *= config.eta
    return found


def cuts(known: Sequence[TrialRecord], config: SearchConfig, most_steps: int) -> Cuts:
    """The cut of each rung that at least eta of the `known` trials reached."""
    if config.scheduler == "none":
        return {}
    found = {}
    for rung in rungs(config, most_steps):
        reached = [score for trial in known if (score := score_at(trial, rung, config)) is not None]
        if len(reached) >= config.eta:
            found[rung] = float(np.percentile(reached, 100 * (1 - 1 / config.eta)))
    return found


def score_at(trial: TrialRecord, rung: int, config: SearchConfig) -> float | None:
    """A trial's score at its first small evaluation from `rung` on; None if it never came there."""
    points = [point for point in trial.curve if point.step >= rung]
    return objectives.score(points[0].figures, config) if points else None


class Judge:
    """Watches one trial: each rung counts once, at the first small evaluation that reaches it."""

    def __init__(self, cuts: Cuts, config: SearchConfig) -> None:
        self.waiting, self.config = sorted(cuts.items()), config

    def judge(self, step: int, figures: Mapping[str, float]) -> str | None:
        """Why the trial ends here, if it does."""
        score = objectives.score(figures, self.config)
        while self.waiting and self.waiting[0][0] <= step:
            rung, cut = self.waiting.pop(0)
            if score < cut:
                return f"asha: score {score:.4f} is under the cut {cut:.4f} of rung {rung} at step {step}"
        return None
