"""Whether a searcher and a scheduler can do anything with a job and its spaces, found before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from test_spaces import SPACE, job

from seuf_ray.config import load
from seuf_ray.errors import ConfigError
from seuf_ray.search.checking import check
from seuf_ray.search.outcome import prepare_search
from seuf_ray.search.suggestions import searcher


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"searcher": "optuna", "max_concurrent": 8}, ["searcher = 'optuna'", "at most 7"]),
        ({"searcher": "nsga2", "objective": "pareto", "max_concurrent": 8}, ["'nsga2' needs 1", "at most 7"]),
        ({"scheduler": "asha", "grace_steps": 1, "max_concurrent": 7}, ["'asha' needs 3", "at most 6"]),
        ({"searcher": "optuna", "num_trials": 2}, ["allowed: 1, with at least 3 trials"]),
    ],
)
def test_searches_that_would_learn_nothing_are_refused(search: dict[str, Any], words: list[str]) -> None:
    """With lag 2 x 8 the last of 16 trials knows none; with 2 x 7 it knows two, and asha compares with three."""
    with pytest.raises(ConfigError) as caught:
        check(job(SPACE, **{"num_trials": 16} | search))
    for word in ("search.max_concurrent = ", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "search",
    [
        {"searcher": "optuna", "max_concurrent": 7},
        {"searcher": "nsga2", "objective": "pareto", "max_concurrent": 7},
        {"scheduler": "asha", "grace_steps": 1, "max_concurrent": 6},
        {"searcher": "random", "max_concurrent": 40},
    ],
)
def test_searches_whose_last_trial_learns_are_not_refused(search: dict[str, Any]) -> None:
    check(job(SPACE, num_trials=16, **search))


def test_what_asha_compares_with_is_counted_over_the_points_of_a_grid() -> None:
    """3 points: as a grid 3 trials, crossed with one draw each 3, with four 12, and lag is 4."""
    space = {"targets.top_m": {"grid": [1, 2, 3]}}
    asha = {"scheduler": "asha", "eta": 2}
    for search in ({"searcher": "grid"}, {"searcher": "random", "num_trials": 1}):
        with pytest.raises(
            ConfigError, match=r"the last of 3 trials would know the results of 0.*1, with at least 4 trials"
        ):
            check(job(space, **asha, **search))
    check(job(space, **asha, num_trials=4))


def test_a_grace_that_no_trial_outlives_is_refused() -> None:
    """Whatever the search's own job has: steps are drawn from 3 to 5 here."""
    asha = {"scheduler": "asha", "num_trials": 16}
    with pytest.raises(ConfigError, match=r"search\.grace_steps = 5: asha could stop no trial.*steps = 5"):
        check(job(SPACE, **asha, grace_steps=5))
    check(job(SPACE, **asha, grace_steps=4))
    with pytest.raises(ConfigError, match=r"search\.grace_steps = 60: .*training\.steps = 60"):
        check(job({"targets.top_m": {"choice": [1, 2]}}, **asha, grace_steps=60))


def test_a_searcher_that_is_not_installed_is_missed_before_anything_starts(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'seuf-ray\[search\]'"):
        prepare_search(job(SPACE, searcher="optuna"))


def test_the_demo_searches_at_least_32_trials() -> None:
    config = load(Path(__file__).parents[1] / "jobs" / "search_demo.toml")
    assert searcher(config, check(config)).total >= 32
