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
from collections.abc import Callable, Collection
from pathlib import Path

import ray
import ray.train
import torch
from safetensors.torch import load_file, save_file

from seuf_ray import config as configs
from seuf_ray import unlearning
from seuf_ray.artifacts import PatchManifest, UnlearningPlan, write_text
from seuf_ray.config import JobConfig
from seuf_ray.data.batches import spread
from seuf_ray.engine import Engine, LocalEngine
from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine
from seuf_ray.job import Job
from seuf_ray.monitor import Task
from seuf_ray.outputs import clear_cache, write_patch
from seuf_ray.patch import require_storable
from seuf_ray.stages.boards import Gauges, TensorBoard
from seuf_ray.stages.group import Settings, WorkerGroup, worker_model
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
    group = WorkerGroup(_work, _settings(job, plan), job.config, "train")
    with TensorBoard(job.path("tensorboard")) as board:
        for message in group.messages():
            progress = Progress(**message)
            _append(job.path("metrics.jsonl"), progress)
            board.show(progress)
            if listener is not None:
                listener(progress)
    clear_cache(job)
    with group.result.checkpoint.as_directory() as folder:
        return write_patch(job, plan, load_file(Path(folder) / "trained.safetensors"))


def _settings(job: Job, plan: UnlearningPlan) -> Settings:
    """What a worker needs to know."""
    return {
        "config": job.config.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json"),
        "folder": str(job.checkpoint.folder),
        "targets": job.targets(plan),
        "task": ray.put(make_task(job)),
        "cache_dir": str(job.cache_dir),
    }


def make_task(job: Job, sets: Collection[str] | None = None) -> Task:
    """Training rows, and the small evaluation's questions and probes: evenly spread over each source.

    Args:
        sets: that losses will read; default: those of the job's own algorithm.
    """
    most = job.config.training.max_questions
    read = unlearning.sets_of(unlearning.passes_of(job.config.algorithm)) if sets is None else sets
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
        idk=job.idk if "idk" in read else [],
    )


def _work(settings: Settings) -> None:
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
    if not config.cluster.uses_deepspeed:
        return LocalEngine(worker_model(config, folder, 1), plan, config.training, config.engine, spill)
    model = worker_model(config, folder, config.cluster.expert_parallel_size)
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
