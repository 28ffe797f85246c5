"""Unlearning as a Ray Train job: one worker group, one engine, and the loop of `unlearning.py`.

Workers report each small evaluation through Ray Train and, beside it, through a queue, so that the driver shows
progress and writes `metrics.jsonl` while training runs. Rank 0's trained tensors come back as the run's checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
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
from seuf_ray.artifacts import PatchManifest, UnlearningPlan, write_text
from seuf_ray.checkpoint import Checkpoint
from seuf_ray.config import JobConfig
from seuf_ray.engine import Engine, LocalEngine
from seuf_ray.job import Job, write_patch
from seuf_ray.model import MoEModel
from seuf_ray.monitor import Task
from seuf_ray.patch import require_storable
from seuf_ray.stages.boards import Gauges, TensorBoard
from seuf_ray.unlearning import Progress

Listener = Callable[[Progress], None]


def unlearn(job: Job, plan: UnlearningPlan, listener: Listener | None = None) -> Path:
    """Train the plan; writes `metrics.jsonl`, `tensorboard/` and `patch/`, and returns the patch folder.

    Args:
        listener: called on the driver with each small evaluation while training runs.
    """
    if job.kept(PatchManifest, "patch/manifest.json") is not None:
        return job.path("patch")
    require_storable(job.checkpoint, plan.tensors)
    if not job.config.resume:  # Ray Train goes on from whatever it finds there
        shutil.rmtree(job.path("train"), ignore_errors=True)
        shutil.rmtree(job.path("tensorboard"), ignore_errors=True)
        job.path("metrics.jsonl").unlink(missing_ok=True)
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = _trainer(job, plan, queue)
    with TensorBoard(job.path("tensorboard")) as board:
        for progress in _watch(trainer, queue):
            _append(job.path("metrics.jsonl"), progress)
            board.show(progress)
            if listener is not None:
                listener(progress)
    shutil.rmtree(job.cache_dir, ignore_errors=True)
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
        "cache_dir": str(job.cache_dir),
    }
    environment = {"OMP_NUM_THREADS": str(_threads(config)), "OMP_WAIT_POLICY": "PASSIVE"}
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
                failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
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
    """One worker: build the engine, run the loop (from the last checkpoint, after a failure), report."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # else two threads scatter gradients in any order
    config = configs.validate(settings["config"])
    plan = UnlearningPlan.model_validate(settings["plan"])
    cache = Path(settings["cache_dir"]) / f"rank_{ray.train.get_context().get_world_rank()}"
    shutil.rmtree(cache, ignore_errors=True)  # of a worker that was killed
    engine = build_engine(config, plan, Path(settings["folder"]), cache)
    saved, gauges = _load_checkpoint(engine.rank), Gauges(config.name)
    for progress in unlearning.run(engine, config, settings["targets"], ray.get(settings["task"]), saved):
        _report(engine, progress)
        if engine.rank == 0:  # after the checkpoint: a line that is shown need not be trained again
            gauges.show(progress)
            told = {"step": progress.step, "metrics": progress.metrics, "stopped": progress.stopped}
            settings["queue"].put({**told, "kept": progress.kept})


def _load_checkpoint(rank: int) -> unlearning.Saved | None:
    """What this rank saved last, if Ray Train restarted it or took up an interrupted run."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        own, common = Path(folder) / f"rank_{rank}.pt", Path(folder) / "rank_0.pt"
        saved: unlearning.Saved = torch.load(own if own.exists() else common, weights_only=True)
        return saved


def _report(engine: Engine, progress: Progress) -> None:
    """Metrics and a checkpoint to Ray Train; the checkpoint holds what trains, never the model.

    The result's tensors go along, so that the last checkpoint is all the driver needs.
    """
    assert progress.save is not None
    metrics = {"step": progress.step, **progress.metrics}
    is_sharded = getattr(engine, "has_sharded_state", False)
    saved = progress.save() if is_sharded or engine.rank == 0 else None
    tensors = engine.tensors()
    if saved is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(saved, Path(folder) / f"rank_{engine.rank}.pt")
        if engine.rank == 0:
            save_file(tensors, Path(folder) / "trained.safetensors")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def build_engine(config: JobConfig, plan: UnlearningPlan, folder: Path, spill: Path) -> Engine:
    """The engine that `cluster.engine` asks for, on this process's device."""
    device = ray.train.torch.get_device() if config.cluster.gpus_per_worker else torch.device("cpu")
    checkpoint, dtype = Checkpoint(folder), getattr(torch, config.model.dtype)
    if not config.cluster.uses_deepspeed:
        return LocalEngine(MoEModel(checkpoint, dtype, device), plan, config.training, config.engine, spill)
    from seuf_ray.deepspeed_engine import (
        DeepSpeedEngine,
        owned_experts,
    )  # a local run does not wait for deepspeed's import

    rank = ray.train.get_context().get_world_rank()
    owned = owned_experts(checkpoint.shape.num_experts, rank, config.cluster.expert_parallel_size)
    model = MoEModel(checkpoint, dtype, device, owned=owned)
    return DeepSpeedEngine(model, plan, config.training, config.cluster, config.engine, spill)


def _append(path: Path, progress: Progress) -> None:
    """One line more; a run that went back to a checkpoint replaces the lines that it repeats."""
    finite = {key: value for key, value in progress.metrics.items() if math.isfinite(value)}
    end = {"stopped": progress.stopped, "kept": progress.kept}
    record = {
        "step": progress.step,
        **finite,
        **{key: value for key, value in end.items() if value is not None},
    }
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < progress.step]
    write_text(path, "\n".join([*kept, json.dumps(record)]) + "\n")
