"""The order of a search: what a trial knows, same seed same trials, early stopping, who is best, records that last."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spaces import SPACE, job

from seuf_ray.artifacts import TrialPoint, TrialRecord
from seuf_ray.config import JobConfig, SearchConfig, validate
from seuf_ray.errors import ConfigError, MismatchError
from seuf_ray.search import halving, objectives
from seuf_ray.search.importance import explained
from seuf_ray.search.schedule import Schedule, Trial


def record(number: int, forget: float, utility: float, drift: float = 0.0, **more: Any) -> TrialRecord:
    figures = {"forget_accuracy": forget, "utility": utility, "drift": drift}
    values = {"number": number, "assignment": {}, "status": "finished", "figures": figures}
    return TrialRecord(**{**values, **more})


def outcome(trial: Trial) -> TrialRecord:
    """A made-up result that depends on the assignment alone; one in four diverges."""
    weight = trial.assignment["anchor.weight"]
    figures = {"forget_accuracy": abs(weight - 1.0) / 2, "utility": 1.0 - weight / 4, "drift": weight / 2}
    curve = [
        TrialPoint(step=step, figures={**figures, "forget_accuracy": 1.0 - step / 9}) for step in (0, 1, 3)
    ]
    status = "diverged" if weight > 1.5 else "finished"
    return TrialRecord(
        number=trial.number, assignment=trial.assignment, status=status, figures=figures, curve=curve
    )


def play(config: JobConfig, seed: int, folder: Path | None = None, most: int = 10**6) -> list[Trial]:
    """Run `most` trials of a search whose trials end in a random order; the trials as they were handed out."""
    rng, schedule = random.Random(seed), Schedule(config, folder)
    running: list[Trial] = []
    handed: list[Trial] = []
    while (schedule.records or running or not handed) and len(handed) < most:
        while len(running) < config.search.max_concurrent and (trial := schedule.next()):
            running.append(trial)
            handed.append(trial)
        if not running:
            break
        schedule.finish(outcome(running.pop(rng.randrange(len(running)))))
    return handed


@pytest.mark.parametrize(
    "search",
    [
        {"searcher": "random"},
        {"searcher": "random", "scheduler": "asha", "grace_steps": 1},
        {"searcher": "optuna", "scheduler": "asha", "grace_steps": 1},
        {"searcher": "optuna", "objective": "pareto"},
        {"searcher": "nsga2", "objective": "pareto"},
    ],
)
def test_the_order_in_which_trials_end_changes_nothing(search: dict[str, Any]) -> None:
    config = job(SPACE, num_trials=16, max_concurrent=3, **search)
    first = play(config, seed=1)
    assert len(first) == 16 and play(config, seed=2) == play(config, seed=3) == first
    other = validate({**config.model_dump(mode="json"), "seed": 1})
    assert [t.assignment for t in play(other, seed=1)] != [t.assignment for t in first]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 15))
def test_a_search_that_goes_on_from_its_records_ends_the_same(tmp_path_factory: Any, stop: int) -> None:
    """Killed after `stop` trials were handed out: those that were not over are run again, no other is."""
    folder = tmp_path_factory.mktemp("trials")
    config = job(SPACE, num_trials=16, searcher="optuna", scheduler="asha", grace_steps=1)
    whole = play(config, seed=0)
    play(config, seed=1, folder=folder, most=stop)
    done = {int(path.stem) for path in folder.glob("*.json")}
    again = play(config, seed=2, folder=folder)
    assert {trial.number for trial in again} == set(range(16)) - done
    assert all(trial == whole[trial.number] for trial in again)


def test_optuna_learns(tmp_path: Path) -> None:
    """Forget accuracy is |w - 1| / 2, so that of TPE's later trials is nearer to 0 than that of its first ones."""
    config = job(
        {"anchor.weight": {"uniform": [0.0, 1.5]}}, num_trials=40, searcher="optuna", objective="forget"
    )
    config = validate(
        {**config.model_dump(mode="json"), "search": {**config.search.model_dump(), "min_utility": 0}}
    )
    found = [abs(trial.assignment["anchor.weight"] - 1.0) for trial in play(config, seed=0)]
    assert sum(found[-20:]) < 0.6 * sum(found[:20])


def test_a_record_of_another_search_is_refused(tmp_path: Path) -> None:
    play(job(SPACE, num_trials=4), seed=0, folder=tmp_path)
    other = validate({**job(SPACE, num_trials=4).model_dump(mode="json"), "seed": 9})
    with pytest.raises(MismatchError, match=r"0000\.json.*overwrite=true"):
        Schedule(other, tmp_path).next()
    (tmp_path / "0001.json").write_text("{")
    with pytest.raises(ConfigError, match=r"0001\.json: not the record of a trial"):
        Schedule(other, tmp_path)


def test_asha_ends_what_is_under_the_best_third() -> None:
    """Scores .1 ... .6 at rung 2: the cut is the percentile 66.7 of them, .1 + .5 x 2/3 = .4333."""
    config = SearchConfig(scheduler="asha", grace_steps=2, eta=3, max_forget=1.0)
    curves = [[TrialPoint(step=2, figures={"forget_accuracy": 0, "utility": u / 10})] for u in range(1, 7)]
    known = [record(n, 0, 0, curve=curve) for n, curve in enumerate(curves)]
    assert halving.rungs(config, 20) == [2, 6, 18]
    cuts = halving.cuts(known, config, 20)
    assert cuts == pytest.approx({2: 0.1 + 0.5 * 2 / 3})
    judge = halving.Judge(cuts, config)
    assert judge.judge(1, {"forget_accuracy": 0, "utility": 0.0}) is None
    assert "under the cut 0.4333 of rung 2" in str(judge.judge(2, {"forget_accuracy": 0, "utility": 0.43}))
    assert halving.Judge(cuts, config).judge(3, {"forget_accuracy": 0, "utility": 0.44}) is None
    assert halving.cuts(known[:2], config, 20) == {}


def test_a_trial_that_meets_the_condition_comes_before_all_that_do_not() -> None:
    """At most .3: utility .5 wins over utility 1 at .31; of equals the one with less drift, then the earlier."""
    config = SearchConfig(objective="utility", max_forget=0.3)
    trials = [record(0, 0.31, 1.0), record(1, 0.3, 0.5, 0.2), record(2, 0.3, 0.5, 0.1)]
    trials.append(record(3, 0.3, 0.5, 0.1))
    assert objectives.score(trials[0].figures, config) == pytest.approx(-0.01)
    assert objectives.best(trials, config) == trials[2]
    assert objectives.best(trials, SearchConfig(objective="forget", min_utility=0.9)) == trials[0]
    assert objectives.best([record(0, 0.1, 1.0, status="diverged")], config) is None


def test_the_front_is_what_nothing_beats() -> None:
    """1 is beaten by 0, 3 equals 2 and is later, 4 has the least drift, 5 diverged."""
    trials = [record(0, 0.2, 0.9, 0.3), record(1, 0.3, 0.9, 0.3), record(2, 0.1, 0.8, 0.3)]
    trials += [
        record(3, 0.1, 0.8, 0.3),
        record(4, 0.9, 0.8, 0.1),
        record(5, 0.0, 1.0, 0.0, status="diverged"),
    ]
    assert [trial.number for trial in objectives.front(trials)] == [0, 2, 4]


def test_importance_is_the_variance_that_a_path_explains() -> None:
    """Groups (0, 2) and (10, 12): within 4, total 104, n 4, k 2: 1 - 4 / 104 x 3 / 2 = .9423."""
    assert explained([0, 2, 10, 12], "aabb") == pytest.approx(1 - 4 / 104 * 3 / 2)
    assert explained([0, 10, 0, 10], "aabb") == 0.0
    assert explained([1, 2, 3], "abc") is None
