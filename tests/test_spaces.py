"""What may be searched: spaces are drawn from repeatably, and a mistake is refused with its path."""

from __future__ import annotations

import random
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seuf_ray.config import JobConfig, validate
from seuf_ray.errors import ConfigError
from seuf_ray.search import spaces
from seuf_ray.search.checking import check, examples
from seuf_ray.search.parsing import parse
from seuf_ray.search.suggestions import searcher

SPACE = {
    "targets.top_m": {"choice": [1, 2]},
    "algorithm.beta": {"loguniform": [0.01, 1.0], "when": {"algorithm.name": ["npo", "dpo"]}},
    "algorithm.name": {"choice": ["ga", "npo", "dpo"]},
    "anchor.weight": {"uniform": [0.0, 2.0]},
    "training.steps": {"randint": [3, 5]},
}


STEPS = {"choice": [3, 4]}


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
            [
                "algorithm.beta",
                "algorithm.name = 'ga'",
                "unknown key",
                """restrict it with when = {"algorithm.name" = ["npo", "dpo"]}""",
            ],
        ),
        (
            {
                "targets.top_m": {"choice": [1, 2], "when": {"training.steps": 3}},
                "training.steps": {"choice": [3, 4], "when": {"targets.top_m": 1}},
            },
            ["targets.top_m, training.steps wait for each other"],
        ),
        ({"targets.top_m": {"choice": [date(1979, 5, 27)]}}, ["search.space.targets.top_m.choice", "1979"]),
        (
            {"targets.top_m": {"choice": [[1, {}]]}},
            ["search.space.targets.top_m.choice", "or lists of these"],
        ),
        (
            SPACE | {"algorithm.beta": {"choice": [0.1], "when": {"algorithm.name": []}}},
            ["search.space.algorithm.beta.when.algorithm.name", "at least one value"],
        ),
        (
            SPACE | {"algorithm.beta": {"choice": [0.1], "when": {"algorithm.name": [date(1979, 5, 27)]}}},
            ["search.space.algorithm.beta.when.algorithm.name", "1979"],
        ),
        (
            {"targets.top_m": {"choice": [1]}, "targets": {"top_m": {"choice": [2]}}},
            ["search.space.targets.top_m: given twice", 'in quotes ("targets.top_m")', "nested tables"],
        ),
        (
            {"algorithm": {"choice": ["ga"]}, "algorithm.name": {"choice": ["npo"]}},
            ["search.space.algorithm.name", "'algorithm'", "'algorithm.name'"],
        ),
        (
            {"targets.top_m": {"grid": [1, 2], "when": {"training.steps": 3}}, "training.steps": STEPS},
            ["search.space.targets.top_m.grid", "training.steps, which is drawn", "write grid there, too"],
        ),
    ],
)
def test_bad_spaces_are_refused_and_named(space: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(job(space))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("space", "path", "left"),
    [
        (
            {
                "training.steps": STEPS,
                "targets.top_m": {"choice": [1, 2], "when": {"training.steps": 3}},
                "anchor.weight": {"uniform": [0, 1], "when": {"training.steps": 4, "targets.top_m": 1}},
            },
            "anchor.weight",
            "training.steps",
        ),
        (
            {
                "algorithm.name": {"choice": ["ga", "npo"]},
                "targets.top_m": {"choice": [1, 2], "when": {"algorithm.name": "ga"}},
                "algorithm.beta": {
                    "uniform": [0, 1],
                    "when": {"algorithm.name": "npo", "targets.top_m": [2, 1]},
                },
            },
            "algorithm.beta",
            "algorithm.name",
        ),
    ],
)
def test_conditions_that_never_hold_together_are_refused(space: dict[str, Any], path: str, left: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(job(space))
    assert f"search.space.{path}.when: its conditions never hold together" in str(caught.value)
    assert f"no value of {left} is left" in str(caught.value)


def test_a_path_may_hang_on_one_that_hangs_on_the_same_value() -> None:
    """Not the first value that its condition allows, but the one that the other condition leaves."""
    space = {
        "algorithm.name": {"choice": ["ga", "npo", "dpo"]},
        "targets.top_m": {"choice": [1, 2], "when": {"algorithm.name": ["npo", "ga"]}},
        "algorithm.beta": {
            "uniform": [0.1, 1],
            "when": {"algorithm.name": ["dpo", "npo"], "targets.top_m": 2},
        },
    }
    drawn = [assignment for assignment, _ in examples(check(job(space))) if "algorithm.beta" in assignment]
    assert {trial["algorithm.name"] for trial in drawn} == {"npo"} and len(drawn) >= 3


@given(st.integers(0, 10**6))
def test_every_example_is_a_whole_trial(seed: int) -> None:
    """Conditions on conditions at random: each example has just the paths that `is_there` says, each path has one."""
    rng, table = random.Random(seed), {}
    for path in ("training.steps", "targets.top_m", "training.batch_size", "training.warmup_steps"):
        above = rng.sample(sorted(table), rng.randint(0, len(table)))
        when = {other: rng.sample([1, 2, 3], rng.randint(1, 3)) for other in above}
        table[path] = {"choice": [1, 2, 3], "when": when}
    try:
        found = parse(table)
    except ConfigError as error:
        assert "never hold together" in str(error)
        assert not all(any(path in point for point in _every_trial(table)) for path in table)
        return
    every = _every_trial(table)
    drawn = [assignment for assignment, _ in examples(found)]
    assert all(assignment in every for assignment in drawn)
    for space in found:
        assert {trial[space.path] for trial in drawn if space.path in trial} == {1, 2, 3}


def _every_trial(table: dict[str, Any]) -> list[dict[str, Any]]:
    """By the meaning of conditions alone."""
    points: list[dict[str, Any]] = [{}]
    for path, space in table.items():
        split = [[p, all(p.get(o) in values for o, values in space["when"].items())] for p in points]
        points = [
            {**p, **more}
            for p, is_on in split
            for more in ([{path: v} for v in (1, 2, 3)] if is_on else [{}])
        ]
    return points


def test_a_value_may_need_another_path() -> None:
    """targets.experts and targets.scope = 'explicit' belong together: no example has one without the other."""
    space = {
        "targets.scope": {"choice": ["model", "explicit"]},
        "targets.experts": {"choice": [[[1, 2]], [[2, 3], [2, 4]]], "when": {"targets.scope": "explicit"}},
        "anchor.weight": {"uniform": [0, 1]},
    }
    for assignment, _ in examples(check(job(space))):
        assert ("targets.experts" in assignment) == (assignment["targets.scope"] == "explicit")


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("targets.top_m", [True]),
        ("targets.top_m", ["1", 2]),
        ("targets.top_m", [1, True]),
        ("targets.top_m", [1, 1.0]),
        ("targets.top_m", [2.0]),
        ("anchor.weight", ["0.1"]),
        ("anchor.weight", [True]),
        ("anchor.weight", [1, 1.0]),
        ("algorithm.name", ["ga", 1]),
    ],
)
def test_values_of_another_type_are_refused(path: str, values: list[Any]) -> None:
    with pytest.raises(ConfigError, match=rf"search\.space\.{path}"):
        check(job({path: {"choice": values}}))


def test_a_whole_number_may_stand_for_any_and_a_file_for_a_list() -> None:
    check(job({"anchor.weight": {"choice": [0, 0.5, 1]}}))
    explicit = {"targets.scope": {"choice": ["explicit"]}, "targets.experts": {"choice": ["./experts.json"]}}
    check(job(explicit))
    check(job({"algorithm": {"choice": ["ga", "npo"]}}))


def test_a_condition_compares_types_too() -> None:
    space = {
        "targets.top_m": {"choice": [1, 2]},
        "anchor.weight": {"choice": [1], "when": {"targets.top_m": True}},
    }
    with pytest.raises(
        ConfigError, match=r"anchor\.weight\.when: targets\.top_m is never True; allowed: 1, 2"
    ):
        check(job(space))
    space["targets.top_m"] = {"choice": [1]}
    hanging = parse(space | {"anchor.weight": {"choice": [1], "when": {"targets.top_m": 1}}})[1]
    assert spaces.is_there(hanging, {"targets.top_m": 1}) and not spaces.is_there(
        hanging, {"targets.top_m": True}
    )


def test_grids_that_hang_on_grids_are_crossed() -> None:
    """(ga; npo x 2 betas) x 2 draws each."""
    space = {
        "algorithm.name": {"grid": ["ga", "npo"]},
        "algorithm.beta": {"grid": [0.1, 0.2], "when": {"algorithm.name": "npo"}},
        "anchor.weight": {"uniform": [0.0, 1.0]},
    }
    config = job(space, num_trials=2)
    found = searcher(config, check(config))
    points = [(t["algorithm.name"], t.get("algorithm.beta")) for t in map(found.ask, range(found.total))]
    assert points == [(name, beta) for name, beta in (("ga", None), ("npo", 0.1), ("npo", 0.2)) for _ in "ab"]


def test_a_grid_of_ranges_and_a_grid_for_optuna_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.beta\.loguniform.*needs a list"):
        check(job(SPACE, searcher="grid"))
    with pytest.raises(ConfigError, match=r"targets\.top_m\.grid.*choice in its place"):
        check(job({"targets.top_m": {"grid": [1, 2]}}, searcher="optuna"))
