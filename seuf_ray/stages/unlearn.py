"""Unlearning as a Ray Train job: one worker group, one engine, and the loop of `unlearning.py`.

Workers report each small evaluation through Ray Train and, beside it, through a queue, so that the driver shows
progress and writes `metrics.jsonl` while training runs. Rank 0's trained tensors come back as the run's checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue
from safetensors.torch import load_file, save_file

from seuf_ray import config as configs
from seuf_ray import unlearning
from seuf_ray.artifacts import PatchManifest, UnlearningPlan
from seuf_ray.checkpoint import Checkpoint
from seuf_ray.config import JobConfig
from seuf_ray.engine import Engine, LocalEngine
from seuf_ray.job import Job, write_patch
from seuf_ray.model import MoEModel
from seuf_ray.unlearning import Progress, Task

Listener = Callable[[Progress], None]


def unlearn(job: Job, plan: UnlearningPlan, listener: Listener | None = None) -> Path:
    """Train the plan; writes `metrics.jsonl` and `patch/`, and returns the patch folder.

    Args:
        listener: called on the driver with each small evaluation while training runs.
    """
    if job.kept(PatchManifest, "patch/manifest.json") is not None:
        return job.path("patch")
    shutil.rmtree(
        job.path("train"), ignore_errors=True
    )  # of an interrupted run; Ray Train would take it for its own
    job.path("metrics.jsonl").unlink(missing_ok=True)
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = _trainer(job, plan, queue)
    for progress in _watch(trainer, queue):
        _append(job.path("metrics.jsonl"), progress)
        if listener is not None:
            listener(progress)
    with trainer.result.checkpoint.as_directory() as folder:
        return write_patch(job, plan, load_file(Path(folder) / "trained.safetensors"))


class _Fit(threading.Thread):
    """`TorchTrainer.fit` beside the driver's main thread, which shows progress meanwhile."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True)
        self.trainer = trainer
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.trainer.fit()
        except BaseException as error:  # handed to the main thread
            self.error = error


def _watch(fit: _Fit, queue: Queue) -> Iterator[Progress]:
    fit.start()
    while fit.is_alive() or not queue.empty():
        try:
            yield Progress(**queue.get(timeout=0.5))
        except Empty:
            continue
    queue.shutdown()
    if fit.error is not None:
        raise fit.error


def _trainer(job: Job, plan: UnlearningPlan, queue: Queue) -> _Fit:
    config = job.config
    cluster = config.cluster
    settings = {
        "config": config.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json"),
        "folder": str(job.checkpoint.folder),
        "targets": job.targets(plan),
        "task": ray.put(make_task(job)),
        "queue": queue,
    }
    environment = {"OMP_NUM_THREADS": str(_threads(config))}
    if not cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    resources = {"CPU": cluster.cpus_per_worker} | (
        {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    )
    return _Fit(
        TorchTrainer(
            _work,
            train_loop_config=settings,
            scaling_config=ray.train.ScalingConfig(
                num_workers=cluster.num_workers,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            torch_config=TorchConfig(timeout_s=1800),
            run_config=ray.train.RunConfig(
                name="train",
                storage_path=str(config.output_dir.absolute()),
                worker_runtime_env={"env_vars": environment},
            ),
        )
    )


def _threads(config: JobConfig) -> int:
    """A lone local worker may use the whole machine; several share it."""
    cluster = config.cluster
    alone = cluster.num_workers == 1 and cluster.address is None
    return max(1, (os.cpu_count() or 1) if alone else int(cluster.cpus_per_worker))


def make_task(job: Job) -> Task:
    """Training rows, and the small evaluation's questions and probes: evenly spread over each source."""
    most = job.config.training.max_questions
    return Task(
        forget=job.forget.rows,
        retain=job.retain.rows,
        quizzes={
            "forget": [quiz.sample(max(1, most // len(job.forget_quizzes))) for quiz in job.forget_quizzes],
            "utility": [
                quiz.sample(max(1, most // len(job.utility_quizzes))) for quiz in job.utility_quizzes
            ],
        },
        probes={
            name: spread(rows, 64)
            for name, rows in (("forget", job.forget.rows), ("retain", job.retain.rows))
        },
        pad_id=job.pad_id,
    )


def spread(rows: list[Any], most: int) -> list[Any]:
    """At most `most` of `rows`, evenly spaced."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows


def _work(settings: dict[str, Any]) -> None:
    """One worker: build the engine, run the loop, report."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = configs.validate(settings["config"])
    plan = UnlearningPlan.model_validate(settings["plan"])
    engine = build_engine(config, plan, Path(settings["folder"]))
    task = ray.get(settings["task"])
    for progress in unlearning.run(engine, config, settings["targets"], task):
        if engine.rank == 0:
            settings["queue"].put(asdict(progress))
        ray.train.report({"step": progress.step, **progress.metrics})
    _hand_over(engine)


def build_engine(config: JobConfig, plan: UnlearningPlan, folder: Path) -> Engine:
    """The engine that `cluster.engine` asks for, on this process's device."""
    device = ray.train.torch.get_device() if config.cluster.gpus_per_worker else torch.device("cpu")
    model = MoEModel(Checkpoint(folder), getattr(torch, config.model.dtype), device)
    if not config.cluster.uses_deepspeed:
        return LocalEngine(model, plan, config.training)
    from seuf_ray.deepspeed_engine import DeepSpeedEngine  # a local run does not wait for deepspeed's import

    return DeepSpeedEngine(model, plan, config.training, config.cluster)


def _hand_over(engine: Engine) -> None:
    """Rank 0's tensors as the run's checkpoint; every rank reports, as Ray Train wants."""
    tensors = engine.tensors()
    if engine.rank != 0:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "trained.safetensors")
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _append(path: Path, progress: Progress) -> None:
    finite = {key: value for key, value in progress.metrics.items() if value == value}
    record = {"step": progress.step, **finite} | ({"stopped": progress.stopped} if progress.stopped else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
