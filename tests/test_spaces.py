"""What may be searched: spaces are drawn from repeatably, and a mistake is refused with its path."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seuf_ray.config import JobConfig, validate
from seuf_ray.errors import ConfigError
from seuf_ray.search import spaces
from seuf_ray.search.checking import check
from seuf_ray.search.parsing import parse

SPACE = {
    "targets.top_m": {"choice": [1, 2]},
    "algorithm.beta": {"loguniform": [0.01, 1.0], "when": {"algorithm.name": ["npo", "dpo"]}},
    "algorithm.name": {"choice": ["ga", "npo", "dpo"]},
    "anchor.weight": {"uniform": [0.0, 2.0]},
    "training.steps": {"randint": [3, 5]},
}


def job(space: dict[str, Any], **search: Any) -> JobConfig:
    return validate({"output_dir": "x", "search": {"space": space, **search}})


def test_names_of_plugins_come_before_their_hyper_parameters() -> None:
    assert parse(SPACE)[0].path == "algorithm.name"


@given(st.integers(0, 10**6))
def test_every_draw_is_in_bounds_is_a_job_and_is_the_same_again(seed: int) -> None:
    found = check(CHECKED) if seed == 0 else FOUND
    drawn = spaces.sample(found, random.Random(seed))
    assert drawn == spaces.sample(found, random.Random(seed))
    assert ("algorithm.beta" in drawn) == (drawn["algorithm.name"] in ("npo", "dpo"))
    assert 0.01 <= drawn.get("algorithm.beta", 0.5) <= 1.0
    assert 3 <= drawn["training.steps"] <= 5
    trial = spaces.derive_trial(CHECKED, drawn)
    assert trial.algorithm.name == drawn["algorithm.name"]
    assert trial.training.steps == drawn["training.steps"]
    assert trial.anchor.weight == drawn["anchor.weight"]  # type: ignore[attr-defined]
    assert trial.search.space == {}


CHECKED = job(SPACE)
FOUND = check(CHECKED)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True), st.integers(1, 4))
def test_a_grid_is_every_combination_once(values: list[int], others: int) -> None:
    """A conditional path multiplies only the points that have it: |M| x (1 + |B|)."""
    betas = [0.1 * (n + 1) for n in range(others)]
    table = {
        "targets.top_m": {"grid": values},
        "algorithm.name": {"choice": ["ga", "npo"]},
        "algorithm.beta": {"choice": betas, "when": {"algorithm.name": "npo"}},
    }
    points = spaces.grid(parse(table))
    assert len(points) == len(values) * (1 + others)
    assert len({str(sorted(point.items())) for point in points}) == len(points)


def test_paths_may_be_written_without_quotes() -> None:
    nested = {"targets": {"top_m": {"choice": [1, 2]}}, "anchor": {"weight": {"uniform": [0, 1]}}}
    assert [space.path for space in parse(nested)] == ["targets.top_m", "anchor.weight"]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, ["no path to search"]),
        ({"trainin.steps": {"choice": [1]}}, ["search.space.trainin.steps", "did you mean 'training'?"]),
        ({"training.stepss": {"choice": [1]}}, ["search.space.training.stepss", "did you mean 'steps'?"]),
        ({"training.steps": {"uniform": [1, 9]}}, ["search.space.training.steps", "valid integer"]),
        ({"training.steps": {"choice": [4, "x"]}}, ["search.space.training.steps", "'x'"]),
        (
            {"training.learning_rate": {"uniform": [-1, 1]}},
            ["search.space.training.learning_rate", "greater"],
        ),
        ({"targets.top_m": {"choice": []}}, ["search.space.targets.top_m.choice", "at least one value"]),
        ({"targets.top_m": {"choice": [1, 1]}}, ["search.space.targets.top_m.choice", "more than once"]),
        ({"targets.top_m": 3}, ["search.space.targets.top_m", "expected a table", "3"]),
        ({"targets.top_m": {"choise": [1]}}, ["search.space", "choise"]),
        ({"targets.top_m": {"choice": [1], "grid": [1]}}, ["search.space.targets.top_m", "exactly one"]),
        ({"anchor.weight": {"loguniform": [0, 1]}}, ["search.space.anchor.weight.loguniform", "over 0"]),
        ({"anchor.weight": {"uniform": [2, 1]}}, ["search.space.anchor.weight.uniform", "under high"]),
        ({"training.steps": {"randint": [1, 2.5]}}, ["search.space.training.steps.randint", "whole numbers"]),
        ({"model.name": {"choice": ["a", "b"]}}, ["search.space.model.name", "trials share this"]),
        ({"training.max_questions": {"choice": [1]}}, ["search.space.training.max_questions", "share"]),
        (
            {"algorithm.beta": {"choice": [0.1], "when": {"algorithm.name": "npo"}}},
            ["search.space.algorithm.beta.when", "'algorithm.name' is not in search.space"],
        ),
        (
            SPACE | {"algorithm.beta": {"uniform": [0.1, 1], "when": {"algorithm.name": "rmu"}}},
            ["search.space.algorithm.beta.when", "never 'rmu'", "'npo'"],
        ),
        (
            SPACE | {"algorithm.beta": {"uniform": [0.1, 1], "when": {"anchor.weight": 1}}},
            ["search.space.algorithm.beta.when", "has no list of values"],
        ),
        (
            SPACE | {"algorithm.beta": {"uniform": [0.1, 1.0]}},
            ["algorithm.beta", "algorithm.name = 'ga'", "unknown key"],
        ),
        (
            {
                "targets.top_m": {"choice": [1, 2], "when": {"training.steps": 3}},
                "training.steps": {"choice": [3, 4], "when": {"targets.top_m": 1}},
            },
            ["targets.top_m, training.steps wait for each other"],
        ),
    ],
)
def test_bad_spaces_are_refused_and_named(space: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(job(space))
    for word in words:
        assert word in str(caught.value)


def test_a_grid_of_ranges_and_a_grid_for_optuna_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.beta\.loguniform.*needs a list"):
        check(job(SPACE, searcher="grid"))
    with pytest.raises(ConfigError, match=r"targets\.top_m\.grid.*choice in its place"):
        check(job({"targets.top_m": {"grid": [1, 2]}}, searcher="optuna"))
