"""How much each searched path alone explains of the score: the correlation ratio, corrected for chance.

    eta^2 = between-group sum of squares / total,    importance = max(0, 1 - (1 - eta^2) (n - 1) / (n - k))

over the n trials that have the path, in k groups: the values of a list, or quarters of a range's draws. It is epsilon
squared (Kelley 1935), the one-way ANOVA's share of variance; 0 is what chance gives. What two paths do together only
shows in neither. Differs from fANOVA (optuna's default), which fits a forest and cannot be read off the table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from seuf_ray.artifacts import TrialRecord
from seuf_ray.config import SearchConfig
from seuf_ray.search import objectives
from seuf_ray.search.parsing import parse

QUARTERS = (0.25, 0.5, 0.75)


def importance(trials: Sequence[TrialRecord], config: SearchConfig) -> dict[str, float]:
    """path -> share of the score's variance that it explains, the largest first; without paths too rarely there."""
    found = {}
    for space in parse(config.space):
        having = [trial for trial in trials if space.path in trial.assignment]
        values = [trial.assignment[space.path] for trial in having]
        groups = [json.dumps(value) for value in values] if space.is_list else _quarters(values)
        share = explained([_score(trial, config) for trial in having], groups)
        if share is not None:
            found[space.path] = share
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _score(trial: TrialRecord, config: SearchConfig) -> float:
    figures = trial.figures if objectives.is_result(trial) else objectives.WORST
    return objectives.score(figures, config)


def _quarters(values: Sequence[float]) -> list[Any]:
    return np.searchsorted(np.quantile(values, QUARTERS), values).tolist() if values else []


def explained(scores: Sequence[float], groups: Sequence[Any]) -> float | None:
    """Epsilon squared of `scores` (n,) by group; None where there are not two trials per group on average."""
    names = sorted(set(groups), key=str)
    n, k = len(scores), len(names)
    if k < 2 or n < 2 * k:
        return None
    parts = [np.array([s for s, g in zip(scores, groups, strict=True) if g == name]) for name in names]
    total = float(((np.array(scores) - np.mean(scores)) ** 2).sum())
    if total == 0:
        return 0.0
    within = float(sum(((part - part.mean()) ** 2).sum() for part in parts))
    return max(0.0, 1.0 - within / total * (n - 1) / (n - k))
