"""What a search is after: figures of a small evaluation -> one score, or several to be traded, and who is best.

    utility   highest utility with forget accuracy f <= x:  score = utility if f <= x, else x - f
    forget    lowest forget accuracy with utility u >= x:   score = 1 - f   if u >= x, else u - x
    pareto    forget accuracy down, utility up, routing drift down: nothing is best, some are beaten by none

A score below 0 says by how much the condition is missed, so any trial that meets it comes before all that do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from seuf_ray.artifacts import TrialRecord
from seuf_ray.config import SearchConfig

Figures = Mapping[str, float]
FIGURES = ("forget_accuracy", "utility", "drift")
DIRECTIONS = ("minimize", "maximize", "minimize")  # of the figures
WORST = {"forget_accuracy": 1.0, "utility": 0.0, "drift": 1.0}  # of a trial that came to nothing


def figures(metrics: Figures) -> dict[str, float]:
    """What trials are compared by, from a small evaluation; drift is that of `guards.max_drift`."""
    kept = [value for name, value in metrics.items() if name.startswith("overlap_topk/forget/")]
    drift = 1.0 - sum(kept) / len(kept) if kept else math.nan
    return {"forget_accuracy": metrics["forget_accuracy"], "utility": metrics["utility"], "drift": drift}


def score(found: Figures, config: SearchConfig) -> float:
    """The one number, higher is better; of pareto it is the gap between utility and forget accuracy."""
    forget, utility = found["forget_accuracy"], found["utility"]
    if config.objective == "utility":
        value = utility if forget <= config.max_forget else config.max_forget - forget
    elif config.objective == "forget":
        value = 1.0 - forget if utility >= config.min_utility else utility - config.min_utility
    else:
        value = utility - forget
    return value if math.isfinite(value) else -math.inf


def words(config: SearchConfig) -> str:
    """The objective in a few words."""
    if config.objective == "utility":
        return f"the highest utility with forget accuracy of at most {config.max_forget:g}"
    if config.objective == "forget":
        return f"the lowest forget accuracy with utility of at least {config.min_utility:g}"
    return "the Pareto front of forget accuracy (low), utility (high) and routing drift (low)"


def limit(config: SearchConfig) -> float | None:
    """What a trial has to keep to before anything else counts."""
    return {"utility": config.max_forget, "forget": config.min_utility}.get(config.objective)


def values(trial: TrialRecord, config: SearchConfig) -> list[float]:
    """What a searcher learns of a trial: the score, or the figures of pareto."""
    found = trial.figures if is_result(trial) else WORST
    return [found[name] for name in FIGURES] if config.objective == "pareto" else [score(found, config)]


def is_result(trial: TrialRecord) -> bool:
    """Whether there are figures to compare."""
    return trial.status in ("finished", "stopped") and all(n in trial.figures for n in FIGURES)


def best(trials: Sequence[TrialRecord], config: SearchConfig) -> TrialRecord | None:
    """The highest score; of equals the one with more utility, then less drift, then the earlier one."""
    results = [trial for trial in trials if is_result(trial)]
    return max(results, key=lambda trial: rank(trial, config), default=None)


def rank(trial: TrialRecord, config: SearchConfig) -> tuple[float, ...]:
    """What results are ordered by, the best highest; drift decides where accuracies do not."""
    found = trial.figures
    return score(found, config), found["utility"], -found["drift"], -trial.number


def front(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those that no other beats in one figure and equals in the rest; of equals the earliest."""
    results = sorted((trial for trial in trials if is_result(trial)), key=lambda trial: trial.number)
    kept = []
    for trial in results:
        others = [other for other in results if other is not trial]
        if not any(_beats(other, trial) for other in others):
            kept.append(trial)
    return kept


def _beats(a: TrialRecord, b: TrialRecord) -> bool:
    """Whether b is of no use beside a."""
    ours, theirs = _costs(a), _costs(b)
    if ours == theirs:
        return a.number < b.number
    return all(x <= y for x, y in zip(ours, theirs, strict=True))


def _costs(trial: TrialRecord) -> tuple[float, ...]:
    found = trial.figures
    return found["forget_accuracy"], -found["utility"], found["drift"]


def chosen(trials: Sequence[TrialRecord], config: SearchConfig) -> list[TrialRecord]:
    """Whose patches are the search's result: the front of pareto, else the best."""
    if config.objective == "pareto":
        return front(trials)
    winner = best(trials, config)
    return [winner] if winner else []
