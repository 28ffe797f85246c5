"""Workers and drivers that are really killed: training goes on from its last checkpoint, to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import make_plan
from test_pipeline import make_config
from torch import Tensor

from seuf_ray import patch
from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.checkpoint.folder import Checkpoint, resolve
from seuf_ray.config import JobConfig
from seuf_ray.job import Job
from seuf_ray.outputs import read_metrics
from seuf_ray.stages.unlearn import unlearn

pytestmark = [pytest.mark.timeout(400), pytest.mark.chaos]
TRAINING = {"steps": 6, "evaluate_every": 2, "max_questions": 10, "batch_size": 8, "learning_rate": 1e-2}


def config_for(folder: Path, algorithm: dict[str, Any], workers: int = 1, **more: Any) -> JobConfig:
    cluster = {"num_workers": workers, "expert_parallel_size": workers, "cpus_per_worker": 0.5}
    return make_config(folder, algorithm=algorithm, training=TRAINING, cluster=cluster, **more)


def result_of(job: Job) -> dict[str, Tensor]:
    return patch.read(job.path("patch"))[1]


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def targets(ray_session: None) -> UnlearningPlan:
    """What attribution finds."""
    return make_plan(Checkpoint(resolve("embedded:specialised")), [(3, 17)])


@pytest.fixture(scope="module")
def quiet(
    targets: UnlearningPlan, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, Tensor]]:
    """What so many workers train when nothing happens."""

    @cache
    def train(workers: int) -> dict[str, Tensor]:
        job = Job(config_for(tmp_path_factory.mktemp("quiet"), {"name": "ga"}, workers))
        unlearn(job, targets)
        return result_of(job)

    return train


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_ends_with_the_undisturbed_patch(
    targets: UnlearningPlan, quiet: Callable[[int], dict[str, Tensor]], tmp_path: Path, workers: int
) -> None:
    """Killed in its fourth step: the group starts again from the checkpoint of step 2."""
    marker = tmp_path / "killed"
    faulty = {"name": "faulty.killed", "marker": str(marker), "at_call": 4}  # gradient ascent
    killed = Job(config_for(tmp_path / "killed_run", faulty, workers))
    unlearn(killed, targets)
    assert marker.exists()
    assert_same_bits(result_of(killed), quiet(workers))
    assert [m["step"] for m in read_metrics(killed)] == [0, 2, 4, 6]
    checkpoints = sorted((killed.path("train") / "train").rglob("rank_0.pt")) or sorted(
        killed.path("train").rglob("rank_0.pt")
    )
    assert checkpoints and checkpoints[0].stat().st_size < 2 * 2**20  # what trains, never the model


def _job_file(folder: Path, seconds: float) -> Path:
    path = folder / "job.toml"
    path.write_text(
        "[data]\nmax_rows = 160\n"
        "[training]\nsteps = 6\nevaluate_every = 2\nmax_questions = 10\nbatch_size = 8\nlearning_rate = 1e-2\n"
        "[evaluation]\nmax_questions = 24\n"
        f"[algorithm]\nname = 'faulty.slow'\nseconds = {seconds}\n"
    )
    return path


def test_resume_after_the_driver_was_killed(
    targets: UnlearningPlan,
    quiet: Callable[[int], dict[str, Tensor]],
    tmp_path: Path,
    kill_driver: Callable[..., None],
    run_job: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """kill -9 of a driver that knows of step 2; `resume=true` repeats that step at most, to the same figures."""
    out, plan_file = tmp_path / "out", targets.write(tmp_path / "plan.json")
    given = [f"output_dir={str(out)!r}", f"inputs.plan={str(plan_file)!r}"]
    command = ["jobs/unlearn.py", str(_job_file(tmp_path, seconds=0.5)), *given]
    metrics = out / "metrics.jsonl"
    kill_driver(command, lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
    before = _figures(metrics)
    run_job(*command, "resume=true")
    said = capsys.readouterr().out
    assert "step    6/6" in said and "step    0/6" not in said
    assert _figures(metrics)[: len(before)] == before
    assert_same_bits(patch.read(out / "patch")[1], quiet(1))


def _figures(metrics: Path) -> list[dict[str, float]]:
    """All but the clock's, which a step that is repeated has anew: its checkpoint may not have been there yet."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
