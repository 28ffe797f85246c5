"""The matched protocol's learning rate: tried on one half of the questions, so that the other half can judge.

Of the grid around the fixed rate, tried with the first seed, the rate with the highest utility at the matched level of
forgetting on the validation questions is taken for every seed; of equals the one nearest the fixed rate. Where the best
is strictly better than the rest and lies at an edge, the grid grows beyond it, up to `max_rates` rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from seuf_ray.paper.methods import fixed_rate
from seuf_ray.paper.settings import PaperSettings

Tried = Mapping[
    float, float | None
]  # learning rate -> validation utility at the level, None: never got there


def grid(settings: PaperSettings, method: str, algorithm: str) -> list[float]:
    """The rates to begin with, ascending."""
    return sorted(rounded(fixed_rate(method, algorithm) * factor) for factor in settings.rate_factors)


def next_rate(tried: Tried, max_rates: int) -> float | None:
    """A rate beyond the edge at which the best one lies; None where there is nothing more to try."""
    rates = sorted(tried)
    if len(rates) < 2 or len(rates) >= max_rates:
        return None
    if all(value is None for value in tried.values()):
        return rounded(rates[-1] * rates[-1] / rates[-2])  # too slow, all of them
    ranked = sorted(rates, key=lambda rate: _value(tried[rate]), reverse=True)
    best, second = ranked[0], ranked[1]
    if _value(tried[best]) <= _value(tried[second]):
        return None
    if best == rates[-1]:
        return rounded(best * best / rates[-2])
    return rounded(best * best / rates[1]) if best == rates[0] else None


def best_rate(tried: Tried, fixed: float) -> float:
    """The rate with the highest validation utility, of equals the one nearest the fixed rate."""
    return min(tried, key=lambda rate: (-_value(tried[rate]), abs(math.log(rate / fixed))))


def rounded(rate: float) -> float:
    """Three significant digits: a rate that people can write down."""
    return float(f"{rate:.3g}")


def _value(utility: float | None) -> float:
    return -1.0 if utility is None else utility
