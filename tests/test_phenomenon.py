"""What the README claims of the embedded model, with wide margins, over three seeds and two forget sets."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from tasks import make_plan

from seuf_ray import unlearning
from seuf_ray.artifacts import Expert
from seuf_ray.config import load
from seuf_ray.engine import LocalEngine
from seuf_ray.job import Job
from seuf_ray.model.moe import MoEModel
from seuf_ray.stages.unlearn import make_task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
DEMO = Path(__file__).resolve().parents[1] / "jobs" / "demo.toml"
C, G = "chemistry", "geography"
TOP: dict[str, Expert] = {C: (3, 17), G: (3, 27)}  # what attribution finds

Run = tuple[str, int, Expert | None, *tuple[str, ...]]
OURS: list[Run] = [(forget, seed, TOP[forget]) for forget, seed in [*((C, s) for s in range(3)), (G, 0)]]
WHOLE = ("targets.scope=full", "anchor.name=none", "training.learning_rate=3e-4")
FULL: list[Run] = [(forget, seed, None, *WHOLE) for forget, seed, _ in OURS]
NO_ANCHOR: list[Run] = [(*run, "anchor.name=none") for run in OURS[:3]]
OTHER_EXPERT: Run = (C, 0, (1, 7), "training.steps=48")
RUNS = [*OURS, *FULL, *NO_ANCHOR, OTHER_EXPERT]


def _train(forget: str, seed: int, expert: Expert | None, *overrides: str) -> dict[str, float]:
    """The last small evaluation of the demo's job with these overrides; without an expert, everything trains."""
    torch.set_num_threads(1)
    fixed = ["training.evaluate_every=60", f"data.forget=embedded:{forget}", f"seed={seed}"]
    job = Job(load(DEMO, [*fixed, "cluster.num_workers=1", "cluster.expert_parallel_size=1", *overrides]))
    plan = make_plan(job.checkpoint, [] if expert is None else [expert])
    engine = LocalEngine(MoEModel(job.checkpoint), plan, job.config.training, job.config.engine)
    *_, last = unlearning.run(engine, job.config, job.targets(plan), make_task(job))
    return last.metrics


@pytest.fixture(scope="module")
def train() -> Iterator[Callable[..., dict[str, float]]]:
    """`_train`'s results; the runs of all tests go on side by side, in two processes of one thread each."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
        runs = {run: pool.submit(_train, *run) for run in RUNS}
        yield lambda *run: runs[run].result()
        pool.shutdown(cancel_futures=True)


def label(run: Run) -> str:
    return f"{run[0]}-{run[1]}"


def drift(metrics: dict[str, float]) -> float:
    return mean(value for name, value in metrics.items() if name.startswith("kl/forget/"))


@pytest.mark.parametrize("run", OURS, ids=label)
def test_one_expert_forgets_and_keeps_the_rest(train: Any, run: Run) -> None:
    metrics = train(*run)
    assert metrics["forget_accuracy"] <= 0.45 and metrics["utility"] >= 0.80


@pytest.mark.parametrize(("full", "ours"), [*zip(FULL, OURS, strict=True)], ids=label)
def test_training_everything_as_long_loses_the_rest(train: Any, full: Run, ours: Run) -> None:
    metrics = train(*full)
    assert metrics["forget_accuracy"] <= 0.45
    assert metrics["utility"] <= train(*ours)["utility"] - 0.25


def test_the_anchor_keeps_the_routing(train: Any) -> None:
    with_anchor = mean(drift(train(*run)) for run in OURS[:3])
    without = mean(drift(train(*run)) for run in NO_ANCHOR)
    assert with_anchor < without


def test_an_expert_that_chemistry_hardly_uses_does_not_forget_it(train: Any) -> None:
    assert train(*OTHER_EXPERT)["forget_accuracy"] >= 0.8
