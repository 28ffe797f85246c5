"""Workers and drivers that are really killed: training goes on from its last checkpoint, to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import make_config
from torch import Tensor

from seuf_ray import patch
from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.config import JobConfig
from seuf_ray.job import Job, read_metrics
from seuf_ray.stages.attribute import attribute
from seuf_ray.stages.plan import plan
from seuf_ray.stages.unlearn import unlearn

pytestmark = pytest.mark.timeout(400)
ROOT = Path(__file__).resolve().parents[1]
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
def targets(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> UnlearningPlan:
    job = Job(config_for(tmp_path_factory.mktemp("plan"), {"name": "ga"}))
    return plan(job, attribute(job))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_ends_with_the_undisturbed_patch(
    targets: UnlearningPlan, tmp_path: Path, workers: int, ray_session: None
) -> None:
    """Killed in its fourth step: the group starts again from the checkpoint of step 2."""
    marker = tmp_path / "killed"
    faulty = {"name": "faulty.killed", "marker": str(marker), "at_call": 4}
    quiet = Job(config_for(tmp_path / "quiet", {**faulty, "at_call": 10**6}, workers))
    killed = Job(config_for(tmp_path / "killed_run", faulty, workers))
    unlearn(quiet, targets)
    unlearn(killed, targets)
    assert marker.exists()
    assert_same_bits(result_of(killed), result_of(quiet))
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


def _drive(folder: Path, plan_file: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [f"output_dir={str(folder / 'out')!r}", f"inputs.plan={str(plan_file)!r}", *more]
    return subprocess.Popen(
        [sys.executable, "jobs/unlearn.py", str(folder / "job.toml"), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for_lines(path: Path, lines: int, driver: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.1)
    pytest.fail(f"{path} never had {lines} lines")


def test_resume_after_the_driver_was_killed(targets: UnlearningPlan, tmp_path: Path) -> None:
    """kill -9 of the driver after the evaluation of step 2; `resume=true` repeats nothing before it."""
    plan_file = targets.write(tmp_path / "plan.json")
    quiet = Job(config_for(tmp_path / "quiet", {"name": "ga"}))
    unlearn(quiet, targets)
    _job_file(tmp_path, seconds=1.5)
    driver = _drive(tmp_path, plan_file)
    _wait_for_lines(tmp_path / "out" / "metrics.jsonl", 2, driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    again = _drive(tmp_path, plan_file, "resume=true")
    said = again.communicate(timeout=200)[0]
    assert again.returncode == 0, said
    assert "step    6/6" in said and "step    0/6" not in said
    assert (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[: len(before)] == before
    assert_same_bits(patch.read(tmp_path / "out" / "patch")[1], result_of(quiet))
