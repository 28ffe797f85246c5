"""What the README claims of the embedded model, with wide margins, over three seeds and two forget sets."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import mean

import pytest
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
TOP: dict[str, Expert] = {"chemistry": (3, 17), "geography": (3, 27)}  # what attribution finds


@cache
def train(forget: str, seed: int, *overrides: str, expert: Expert | None = None) -> dict[str, float]:
    """The last small evaluation of the demo's job with these overrides; scope = full for no experts."""
    fixed = ["training.evaluate_every=60", f"data.forget=embedded:{forget}", f"seed={seed}"]
    job = Job(load(DEMO, [*fixed, "cluster.num_workers=1", "cluster.expert_parallel_size=1", *overrides]))
    is_full = job.config.targets.scope == "full"
    plan = make_plan(job.checkpoint, [] if is_full else [expert or TOP[forget]])
    engine = LocalEngine(MoEModel(job.checkpoint), plan, job.config.training, job.config.engine)
    *_, last = unlearning.run(engine, job.config, job.targets(plan), make_task(job))
    return last.metrics


def drift(metrics: dict[str, float]) -> float:
    return mean(value for name, value in metrics.items() if name.startswith("kl/forget/"))


@pytest.mark.parametrize(
    ("forget", "seed"), [("chemistry", 0), ("chemistry", 1), ("chemistry", 2), ("geography", 0)]
)
def test_one_expert_forgets_and_keeps_the_rest(forget: str, seed: int) -> None:
    metrics = train(forget, seed)
    assert metrics["forget_accuracy"] <= 0.45 and metrics["utility"] >= 0.80


@pytest.mark.parametrize(("forget", "seed"), [("chemistry", 0), ("chemistry", 1), ("geography", 0)])
def test_training_everything_as_long_loses_the_rest(forget: str, seed: int) -> None:
    metrics = train(forget, seed, "targets.scope=full", "anchor.name=none", "training.learning_rate=3e-4")
    assert metrics["forget_accuracy"] <= 0.45
    assert metrics["utility"] <= train(forget, seed)["utility"] - 0.25


def test_the_anchor_keeps_the_routing() -> None:
    with_anchor = mean(drift(train("chemistry", seed)) for seed in range(3))
    without = mean(drift(train("chemistry", seed, "anchor.name=none")) for seed in range(3))
    assert with_anchor < without


def test_an_expert_that_chemistry_hardly_uses_does_not_forget_it() -> None:
    assert train("chemistry", 0, "training.steps=48", expert=(1, 7))["forget_accuracy"] >= 0.8
