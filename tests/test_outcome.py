"""What a search leaves and shows of its trials, without Ray: patches, tables, the page and the console."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from records import evaluation
from test_baselines import report_of
from test_report import Page
from tiny import save_tiny

from seuf_ray import patch
from seuf_ray.artifacts import PatchManifest, SearchReport, TrialRecord, UnlearningPlan
from seuf_ray.attribution.selection import plan_for
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import validate
from seuf_ray.console import show_kept, show_search, trial_printer
from seuf_ray.job import Job
from seuf_ray.report import write_search_page
from seuf_ray.search.outcome import finish_search
from seuf_ray.search.schedule import FOLDER, tensors_path
from seuf_ray.search.spaces import derive_trial
from seuf_ray.stages.trials import save_tensors

SPACE = {
    "targets.top_m": {"choice": [1, 2]},
    "anchor": {"weight": {"loguniform": [0.01, 100.0]}},  # as it arrives where the path is not in quotes
}
# forget accuracy, utility, drift: of at most .3 the third has the most utility; it, the fourth and the last one are
# beaten by none; the second equals the third but for its drift.
FIGURES = [(0.5, 0.7, 0.4), (0.2, 0.8, 0.3), (0.2, 0.8, 0.2), (0.1, 0.5, 0.3), None, (0.6, 0.95, 0.1)]
WEIGHTS = [0.01, 0.1, 1.0, 10.0, 30.0, 100.0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen2_moe")


def trials() -> list[TrialRecord]:
    """Six trials on two bases: the fourth was stopped early, the fifth lost its worker."""
    names = ("forget_accuracy", "utility", "drift")
    found = []
    for number, figures in enumerate(FIGURES):
        status = "failed" if figures is None else "stopped" if number == 3 else "finished"
        known = dict(zip(names, figures or (), strict=False))
        found.append(
            TrialRecord(
                number=number,
                assignment={"targets.top_m": 1 + number % 2, "anchor.weight": WEIGHTS[number]},
                status=status,
                why="" if status == "finished" else "a reason",
                step=4,
                figures=known,
                metrics=known,
                seconds=1.5,
                worker="" if figures is None else f"host:{number % 2}",
            )
        )
    return found


def finish(tiny: Path, folder: Path, **search: Any) -> tuple[Job, SearchReport]:
    """The end of a search with these trials, whose tensors all hold their number."""
    values = {"output_dir": str(folder), "model": {"name": str(tiny)}, "search": {"space": SPACE, **search}}
    job = Job(validate(values))
    report, records = report_of(Checkpoint(tiny)), trials()
    for trial in records:
        plan = plan_for(derive_trial(job.config, trial.assignment), report, job.checkpoint)
        tensors = {
            name: torch.full(job.checkpoint.info(name)[1], float(trial.number)) for name in plan.tensors
        }
        save_tensors(tensors_path(job.path(FOLDER), trial.number), tensors)
    return job, finish_search(job, report, records)


@pytest.fixture(scope="module")
def best_of(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, SearchReport]:
    return finish(tiny, tmp_path_factory.mktemp("utility") / "out", max_forget=0.3)


@pytest.fixture(scope="module")
def front_of(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, SearchReport]:
    return finish(tiny, tmp_path_factory.mktemp("pareto") / "out", objective="pareto")


def test_of_one_objective_the_best_trial_is_left(best_of: tuple[Job, SearchReport]) -> None:
    job, found = best_of
    assert found == SearchReport.read(job.path("search.json"))
    assert found.best == 2 and found.chosen == [2] and set(found.patches) == {2}
    assert found.scores == pytest.approx([-0.2, 0.8, 0.8, 0.5, None, -0.3])
    assert found.overrides == ["targets.top_m=1", "anchor.weight=1.0"]
    assert held(job, "patch") == {2.0} and not job.path("patches").exists()
    assert UnlearningPlan.read(job.path("plan.json")).top_m == 1


def test_of_several_objectives_the_front_is_left(front_of: tuple[Job, SearchReport]) -> None:
    """`patch/` is of the widest gap, .8 - .2."""
    job, found = front_of
    assert found.chosen == [2, 3, 5] and found.best == 2 and set(found.patches) == {2, 3, 5}
    assert sorted(path.name for path in job.path("patches").iterdir()) == ["0002", "0003", "0005"]
    for number in found.chosen:
        assert held(job, f"patches/{number:04d}") == {float(number)}
        manifest = PatchManifest.read(job.path(f"patches/{number:04d}") / "manifest.json")
        assert manifest.fingerprint == found.patches[number]
    assert held(job, "patch") == {2.0}


def held(job: Job, name: str) -> set[float]:
    """The values in a patch."""
    return {value for tensor in patch.read(job.path(name))[1].values() for value in tensor.unique().tolist()}


def test_the_table_has_a_column_for_each_path_and_figure(front_of: tuple[Job, SearchReport]) -> None:
    with front_of[0].path("search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["is_chosen"] for row in rows] == ["false", "false", "true", "true", "false", "true"]
    assert [float(row["anchor.weight"]) for row in rows] == WEIGHTS
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["stopped", "failed", "finished"]
    assert rows[1]["forget_accuracy"] == "0.2" and rows[4]["forget_accuracy"] == "" == rows[4]["score"]
    assert {"number", "targets.top_m", "utility", "drift", "step", "seconds", "why"} <= rows[0].keys()


def test_what_a_path_explains_is_kept_where_there_are_trials_enough(
    best_of: tuple[Job, SearchReport],
) -> None:
    """Two values over six trials; four quarters would need eight."""
    assert list(best_of[1].importance) == ["targets.top_m"] and best_of[1].importance["targets.top_m"] == 0.0


# -- the page ----------------------------------------------------------------------------------------------------


def page_of(found: SearchReport, folder: Path) -> str:
    before, after = evaluation(0.9325, 0.91, 0.0), evaluation(0.3125, 0.89, 0.12)
    text = write_search_page(folder / "page.html", found, before, after).read_text()
    Page(text)
    return text


def test_the_page_of_one_objective(best_of: tuple[Job, SearchReport], tmp_path: Path) -> None:
    text = page_of(best_of[1], tmp_path)
    assert (
        "Trial 2 is the best of 6: 4 went on to their end, 1 were stopped early, 1 came to nothing." in text
    )
    assert "On all questions its patch takes forget accuracy from 0.932 to 0.312" in text
    assert marks(text) == [2] and ">max_forget 0.3</text>" in text
    assert re.search(r"Bases loaded</div><div class=\"big\">2<", text)
    assert "What mattered" in text and "the best one thick" in text


def test_the_page_of_a_front_calls_no_trial_the_best(
    front_of: tuple[Job, SearchReport], tmp_path: Path
) -> None:
    text = page_of(front_of[1], tmp_path)
    assert "3 of 6 trials are on the front" in text and not re.search(r"\bbest\b", visible(text))
    assert "the patch of trial 2, of these the one with the widest gap" in text
    assert marks(text) == [2, 3, 5] and "max_forget" not in text
    assert [tile in text for tile in (">0.100<", ">0.950<", ">0.100<")] == [True] * 3
    assert text.count("on the front, small evaluation") == 3


def visible(text: str) -> str:
    """What a reader sees of a page, tooltips included."""
    kept: list[str] = []

    class Text(HTMLParser):
        def handle_data(self, data: str) -> None:
            kept.append(data)

    Text().feed(re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))
    return " ".join(kept)


def marks(text: str) -> list[int]:
    """The trials that are marked: alike in both pictures and in the table."""
    dots = [int(n) for n in re.findall(r'<circle class="best"[^>]*><title>trial (\d+) ', text)]
    threads = [int(n) for n in re.findall(r'<polyline class="thread bold"[^>]*><title>trial (\d+) ', text)]
    rows = [int(n) for n in re.findall(r'<tr class="strong"><td class="n" title="(\d+)"', text)]
    assert sorted(dots) == sorted(threads) == sorted(rows)
    return sorted(dots)


def test_the_limit_of_utility_is_drawn_inside_the_picture(tiny: Path, tmp_path: Path) -> None:
    """No trial has .99: the picture reaches up to it all the same."""
    _, found = finish(tiny, tmp_path / "out", objective="forget", min_utility=0.99)
    text = page_of(found, tmp_path)
    height = re.search(r'y="([\d.]+)">min_utility 0.99</text>', text)
    assert height and 0 < float(height[1]) < 360


def test_a_path_without_quotes_has_an_even_axis_in_the_logarithm_too(
    best_of: tuple[Job, SearchReport], tmp_path: Path
) -> None:
    """.01 to 100 are four decades: weight 1 is in the middle of the axis, from y = 34 to 254."""
    found = best_of[1]
    assert found.space["anchor.weight"] == {"loguniform": [0.01, 100.0]}
    points = re.search(r'<polyline class="thread bold"[^>]*points="([^"]*)"', page_of(found, tmp_path))
    assert points and points[1].split()[1].endswith(",144.0")


# -- the console -------------------------------------------------------------------------------------------------


def printed(found: SearchReport, config: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The table while trials end, and what is said of them all."""
    show, known = trial_printer(config), []
    show_kept(2, 6)
    for record in found.trials:
        known.append(record)
        show(record, list(known), len(found.trials))
    show_search(found)
    return capsys.readouterr().out.splitlines()


def test_the_console_of_one_objective(best_of: tuple[Job, SearchReport], capsys: Any) -> None:
    job, found = best_of
    lines = printed(found, job.config.search, capsys)
    assert "2 of 6 trials are kept" in lines[0] and lines[1].split()[:3] == ["trial", "end", "score"]
    rows = [line for line in lines if re.match(r"[* ] +\d \(\d/6\)", line)]
    assert [line[0] for line in rows] == ["*", "*", "*", " ", " ", " "]  # each was the best until then
    assert rows[2].split()[4:8] == ["0.800", "0.200", "0.800", "0.200"]
    assert (
        rows[4].split()[2:7] == ["failed", "-", "-", "-", "-"]
        and lines[lines.index(rows[4]) + 1].strip() == "a reason"
    )
    assert any("trial 2 is the best: the highest utility" in line for line in lines)
    assert lines[-3:] == [
        "    targets.top_m=1",
        "    anchor.weight=1.0",
        "  what explains the score: targets.top_m 0%",
    ]


def test_the_console_of_a_front_calls_no_trial_the_best(
    front_of: tuple[Job, SearchReport], capsys: Any
) -> None:
    job, found = front_of
    lines = printed(found.model_copy(update={"importance": {}}), job.config.search, capsys)
    text = "\n".join(lines)
    rows = [line for line in lines if re.match(r"[* ] +\d \(\d/6\)", line)]
    assert [line[0] for line in rows] == ["*", "*", "*", "*", " ", "*"]
    assert "on the front are 3 of 6 trials: 2, 3, 5" in text and "patch/ is of trial 2" in text
    assert not re.search(r"\bbest\b", text) and "what explains" not in text
