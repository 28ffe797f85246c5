"""The paper's tables: cells, splits, tuning, resuming after a killed driver, and what the committed results say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seuf_ray.config import load_as
from seuf_ray.data.rows import Row
from seuf_ray.errors import ConfigError, DataError
from seuf_ray.paper.cells import Cell, Store, fixed_cells, matched_cell
from seuf_ray.paper.claims import GAPS, claims
from seuf_ray.paper.experiment import cell_config
from seuf_ray.paper.methods import METHODS, PAPER_ALGORITHMS
from seuf_ray.paper.picture import curve_of, picture
from seuf_ray.paper.publish import _edges
from seuf_ray.paper.settings import PaperSettings
from seuf_ray.paper.splits import part_of, sampled, sentences_of
from seuf_ray.paper.tables import ATTACKS, all_tables, spread
from seuf_ray.paper.tuning import best_rate, next_rate
from seuf_ray.quiz import Quiz
from seuf_ray.stages.paper import tune

ROOT = Path(__file__).resolve().parents[1]
JOB, FILE = ROOT / "jobs" / "paper_tables.py", ROOT / "jobs" / "paper_tables.toml"
RESULTS = ROOT / "benchmarks" / "results" / "paper_tables.json"


def settings_of(*overrides: str) -> PaperSettings:
    return load_as(PaperSettings, FILE, list(overrides))


# --- the matrix ---


def test_the_matrix_has_every_method_and_loss_and_three_seeds_of_what_claims_are_made_of() -> None:
    settings = settings_of()
    first, rest = fixed_cells(settings)
    ours = [cell for cell in first + rest if cell.model == settings.model]
    assert {cell.method for cell in ours} == set(METHODS) and len(set(first + rest)) == len(first + rest)
    for method in ("full", "lora", "esft", "random", "routers", "seuf_one", "seuf_layer_top1"):
        for algorithm in PAPER_ALGORITHMS:
            seeds = [cell.seed for cell in first if (cell.method, cell.algorithm) == (method, algorithm)]
            assert sorted(seeds) == [0, 1, 2]


@pytest.mark.parametrize(
    ("method", "rate"), [("full", 3e-4), ("seuf_one", 3e-3), ("seuf_layer_top1_frozen", 3e-3)]
)
def test_a_cell_is_a_job(method: str, rate: float) -> None:
    settings = settings_of("methods=" + json.dumps([method]), 'algorithms=["ga"]', "seeds=[7]")
    cell = fixed_cells(settings)[method.startswith("seuf_layer_top1_")][0]
    config = cell_config(settings, cell)
    assert (config.training.learning_rate, config.training.steps, config.seed) == (rate, 60, 7)
    assert config.training.stop_at_forget_accuracy is None and config.training.max_grad_norm == 1
    matched = matched_cell(settings, "matched", settings.forget, method, "ga", 7, rate)
    assert cell_config(settings, matched).training.stop_at_forget_accuracy == settings.matched_level


@pytest.mark.parametrize("method", [*METHODS])
@pytest.mark.parametrize("algorithm", ["ga", "rmu_retain_10"])
def test_every_method_is_a_valid_job(method: str, algorithm: str) -> None:
    cell = matched_cell(settings_of(), "tune", "embedded:geography", method, algorithm, 0, 1e-3)
    assert cell_config(settings_of(), cell).algorithm.name == algorithm.split("_")[0]


def test_a_name_that_there_is_not_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match="'seuf_won' is no method; did you mean 'seuf_one'"):
        settings_of('methods=["seuf_won"]')
    with pytest.raises(ConfigError, match="seedz: unknown key; did you mean 'seeds'"):
        settings_of("seedz=[1]")


# --- splits and tuning ---


def quiz_of(number: int) -> Quiz:
    return Quiz(
        "x", [Row((q, c, 1)) for q in range(number) for c in range(4)], [q % 4 for q in range(number)], 4
    )


@pytest.mark.parametrize("number", [2, 7, 100])
def test_no_question_both_chooses_and_judges(number: int) -> None:
    halves = [
        {row.ids[0] for row in part_of(quiz_of(number), split).rows} for split in ("validation", "test")
    ]
    assert halves[0] & halves[1] == set() and halves[0] | halves[1] == set(range(number))
    for half, split in zip(halves, ("validation", "test"), strict=True):
        (part,) = sampled([quiz_of(number)], split, 5)
        assert {row.ids[0] for row in part.rows} <= half and len(part.answers) == min(5, len(half))


def test_relearning_sees_no_sentence_of_a_test_fact() -> None:
    """3 questions of 2 sentences each: facts 0 and 2 are validation facts."""
    assert sentences_of(["0a", "0b", "1a", "1b", "2a", "2b"], 3, "validation") == ["0a", "0b", "2a", "2b"]
    with pytest.raises(DataError, match="7 texts are not the same number for each of 3"):
        sentences_of(list("abcdefg"), 3, "test")


@pytest.mark.parametrize(
    ("tried", "rate"),
    [
        ({1.0: 0.5, 3.0: 0.9, 9.0: 0.7}, None),  # inside
        ({1.0: 0.5, 3.0: 0.7, 9.0: 0.9}, 27.0),
        ({1.0: 0.9, 3.0: 0.7, 9.0: 0.5}, 0.333),
        ({1.0: 0.9, 3.0: 0.9, 9.0: 0.5}, None),  # no better than its neighbour
        ({1.0: None, 3.0: None, 9.0: None}, 27.0),  # all too slow
        ({1.0: 0.5, 3.0: 0.6, 9.0: 0.7, 27.0: 0.8}, None),  # enough
    ],
)
def test_a_grid_grows_beyond_the_edge_where_the_best_rate_lies(tried: Any, rate: float | None) -> None:
    assert next_rate(tried, max_rates=4) == rate


def test_of_equal_rates_the_one_nearest_the_fixed_rate_is_taken() -> None:
    assert best_rate({1.0: 0.9, 3.0: 0.9, 9.0: 0.9}, fixed=3.0) == 3.0
    assert best_rate({1.0: 0.95, 3.0: 0.9, 9.0: None}, fixed=3.0) == 1.0


# --- tables ---


def result_of(method: str, seed: int, forget: float, utility: float) -> dict[str, Any]:
    row = {
        "model": "embedded:specialised",
        "forget_set": "embedded:chemistry",
        "method": method,
        "algorithm": "ga",
    }
    row |= {
        "seed": seed,
        "protocol": "fixed",
        "forget": forget,
        "utility": utility,
        "perplexity": 16.0,
        "kl": 0.1,
    }
    row |= {
        "overlap": 0.9,
        "trainable_fraction": 0.01,
        "learning_rate": 1e-3,
        "steps": 60,
        "utility_at_level": None,
    }
    curve = [{"step": 0, "forget_accuracy": 1.0, "utility": 1.0}]
    return {"row": row, "curve": [*curve, {"step": 60, "forget_accuracy": forget, "utility": utility}]}


def test_tables_claims_and_curves_are_means_over_seeds() -> None:
    """Utilities .8 and .9: .850 with standard deviation .071; a gap of .85 - .45 = .4 to full's."""
    assert spread([0.8, 0.9]) == "0.850 ± 0.071" and spread([None]) == "–" and spread([0.5]) == "0.500"
    results = [result_of("seuf_one", 0, 0.3, 0.8), result_of("seuf_one", 1, 0.2, 0.9)]
    results += [result_of("full", 0, 0.2, 0.4), result_of("full", 1, 0.2, 0.5)]
    rows, settings = [result["row"] for result in results], settings_of()
    (main, *_) = all_tables(rows, settings)
    assert "| GA | SEUF, one expert | 0.250 ± 0.071 | 0.850 ± 0.071 |" in main and "0.2987 / 0.5012" in main
    gap, *inversions = claims(rows, settings)
    assert gap.held and "gap +0.400" in gap.figures
    assert [claim.held for claim in inversions] == [True, True]  # of 160 questions .147 would be one
    assert curve_of(results, "full", "ga")[-1] == pytest.approx((0.2, 0.45, 0.0, 0.0707), abs=1e-3)
    assert picture(results, ["full", "seuf_one"], ["ga"], 0.4).count("<polyline") == 2


def test_no_claim_is_dropped_where_forgetting_never_came_so_far() -> None:
    results = [
        result_of("full", 0, 0.6, 0.9),
        result_of("seuf_one", 0, 0.3, 0.9),
        result_of("seuf_one", 1, 0.1, 0.9),
    ]
    rows = [result["row"] | {"protocol": "matched"} for result in results]
    (matched,) = claims(rows, settings_of())
    assert not matched.held and "no seed in which both" in matched.figures
    inverted = claims([result["row"] for result in results[1:]], settings_of())
    assert [claim.held for claim in inverted] == [False]  # .1 is under .147


def test_a_best_rate_at_the_edge_of_what_was_tried_is_named() -> None:
    rows = [
        result_of("full", 0, 0.4, 0.9)["row"]
        | {"protocol": "tune", "learning_rate": rate, "utility_at_level": utility}
        for rate, utility in ((1e-4, 0.99), (3e-4, 0.95), (9e-4, None))
    ]
    (said,) = _edges(rows)
    assert "all parameters with GA on embedded:chemistry (0.0001)" in said
    assert list(_edges([*rows, rows[0] | {"learning_rate": 3e-5, "utility_at_level": 0.99}])) == []


class Known:
    """In place of the runner: what each rate comes to, and which were asked for."""

    def __init__(self, utility: Callable[[float], float | None]) -> None:
        self.utility, self.done, self.asked = utility, {}, []

    def run(self, cells: list[Cell]) -> None:
        self.asked += [cell.learning_rate for cell in cells]
        self.done |= {cell: {"row": {"utility_at_level": self.utility(cell.learning_rate)}} for cell in cells}


def test_every_grid_grows_until_its_best_rate_is_inside() -> None:
    """Fixed rate 3e-4: 9e-5, 3e-4, 9e-4 are tried; best at 9e-5, so 2.7e-5, better yet, then 8.1e-6, which is worse."""
    few = 'matched_methods=["full"]', 'algorithms=["ga"]', 'matched_forget=["embedded:chemistry"]'
    settings = settings_of(*few)
    runner = Known(lambda rate: 1 - abs(math.log(rate / 2.7e-5)) / 10)
    (rates,) = tune(settings, runner).values()  # type: ignore[arg-type]
    assert runner.asked == pytest.approx([9e-5, 3e-4, 9e-4, 2.7e-5, 8.1e-6], rel=0.01)
    assert best_rate(rates, 3e-4) == pytest.approx(2.7e-5)


# --- the store, and a driver that is killed ---

CELL = Cell(
    model="m",
    forget="f",
    method="full",
    algorithm="ga",
    seed=0,
    protocol="fixed",
    learning_rate=1e-3,
    steps=3,
    evaluate_every=1,
)


def test_a_result_belongs_to_what_it_was_made_from(tmp_path: Path) -> None:
    made_from = {("m", "f"): {"data": "1"}}
    store = Store(tmp_path, made_from)
    store.write(CELL, {"row": {"forget": 0.5}})
    assert (found := store.read(CELL)) is not None and found["row"] == {"forget": 0.5}
    assert store.read(CELL.model_copy(update={"steps": 4})) is None
    assert Store(tmp_path, {("m", "f"): {"data": "2"}}).read(CELL) is None
    store.path(CELL).write_text(store.path(CELL).read_text()[:-20])
    assert store.read(CELL) is None  # half a file is none


SMALL = [
    'methods=["original", "seuf_one"]', 'algorithms=["ga", "npo"]', "seeds=[0]", "other_models=[]", "matched_forget=[]",
    'robustness_methods=["seuf_one"]', "varied={}", "steps={ga=2, npo=2}", 'overrides=["training.batch_size=4"]',
    "measuring={curve=4, final=4, matched=4, texts=4}", "cluster.num_workers=1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.chaos
def test_a_killed_driver_loses_only_the_cells_under_way(
    tmp_path: Path,
    kill_driver: Callable[..., None],
    run_job: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed after the first cell's file is there; the second run does not touch it, and finishes the others."""
    command = [str(JOB), str(FILE), f"output_dir={tmp_path}", *SMALL]
    cells = tmp_path / "cells"
    kill_driver(command, lambda: list(cells.glob("*.json")))
    done = list(cells.glob("*.json"))
    before = {path: path.stat().st_mtime_ns for path in done}
    recorded = tmp_path / "recorded"
    run_job(*command, f"record={recorded}")
    said = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in done} == before
    rows = json.loads((tmp_path / "paper_tables.json").read_text())["rows"]
    assert sorted((row["method"], row["algorithm"]) for row in rows) == [
        ("original", "ga"), ("seuf_one", "ga"), ("seuf_one", "npo")
    ]  # fmt: skip
    assert len(re.findall(r"^ +\d+/3  ", said, re.MULTILINE)) == 3 - len(done)
    attacked = [row["robustness"] for row in rows if row["algorithm"] == "ga"]
    assert all(0 <= found[attack] <= 1 for found in attacked for attack in ATTACKS)
    written = {path.name for path in (recorded / "results").iterdir()}
    assert written == {"paper_tables.json", "paper_tables.svg", "paper_tables_ablations.svg"}
    assert "| GA | SEUF, one expert | " in (recorded / "RESULTS.md").read_text()


# --- what the committed results say ---

FIELDS = {
    "model", "method", "algorithm", "seed", "protocol", "forget", "utility", "perplexity", "overlap", "kl",
    "trainable_fraction", "learning_rate", "steps",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return found


def test_committed_rows_say_what_tables_need(rows: list[dict[str, Any]]) -> None:
    assert all(row.keys() >= FIELDS for row in rows)
    for row in rows:
        assert all(0 <= row[key] <= 1 for key in ("forget", "utility", "overlap", "trainable_fraction"))
        assert row["kl"] >= -1e-6


def test_seuf_forgets_and_keeps_the_rest_in_the_committed_rows(rows: list[dict[str, Any]]) -> None:
    """Three seeds of every loss; fixed protocol on the specialised model."""
    fixed = [row for row in rows if (row["protocol"], row["model"]) == ("fixed", "embedded:specialised")]
    for algorithm in PAPER_ALGORITHMS:
        of = {
            m: [r for r in fixed if (r["method"], r["algorithm"]) == (m, algorithm)]
            for m in ("full", "seuf_one")
        }
        assert all(len({row["seed"] for row in part}) >= 3 for part in of.values())
        means = {m: sum(row["utility"] for row in part) / len(part) for m, part in of.items()}
        assert means["seuf_one"] - means["full"] >= GAPS[algorithm]
        assert all(row["forget"] <= 0.6 for row in of["seuf_one"])


def test_tables_and_picture_are_those_of_the_committed_rows(rows: list[dict[str, Any]]) -> None:
    """The section of RESULTS.md has every table that its rows give."""
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    settings = PaperSettings.model_validate({"output_dir": "x", **document["settings"]})
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert all(table in text for table in all_tables(document["rows"], settings))
    assert all(claim.line() in text for claim in claims(document["rows"], settings))
    assert RESULTS.with_suffix(".svg").read_text(encoding="utf-8").startswith("<svg")
