"""What the cluster has for a job, and whether the job fits: the part of planning that asks Ray.

Ray knows each node's memory but not its GPUs', nor how fast anything is: a task on one worker's resources looks. Where
the driver's node is the only one and no GPU is asked for, the driver looks itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import torch

from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.checkpoint.sizes import ModelSize
from seuf_ray.config import JobConfig
from seuf_ray.job import Job
from seuf_ray.planning import (
    AttributionEngine,
    AttributionNeeds,
    UnlearningNeeds,
    choose_engine,
    plan_summary,
    require_room,
)
from seuf_ray.resources import Node, Resources, autoscales
from seuf_ray.stages.group import threads
from seuf_ray.stages.session import nodes

WAIT = 1800.0  # seconds for a cluster that autoscales to start the first worker's node


def foresee(job: Job, plan: UnlearningPlan) -> list[tuple[str, str]]:
    """What training `plan` will take, as lines (name, text).

    Raises:
        ConfigError: its weights do not fit, or no node takes a worker.
    """
    config, size = job.config, ModelSize.of(job.checkpoint)
    needs = UnlearningNeeds.of(config, job.checkpoint, plan, job.targets(plan))
    there = at_hand(config)
    require_room(needs, there, config, size)
    device = "cuda" if config.cluster.gpus_per_worker else "cpu"
    speed = _on_a_worker(config, product_speed, device, config.model.dtype, threads(config.cluster))
    return plan_summary(config, size, needs, replace(there, flops=speed))


def fitting_engine(job: Job) -> tuple[AttributionEngine, str]:
    """The attribution engine of `attribution.engine = "auto"`, and why."""
    needs = AttributionNeeds.of(job.config, ModelSize.of(job.checkpoint))
    return choose_engine(needs, at_hand(job.config), job.config)


def at_hand(config: JobConfig) -> Resources:
    """The cluster as it is; one that autoscales is made to start a node for one worker.

    Raises:
        ray.exceptions.GetTimeoutError: no such node within half an hour.
    """
    gpu_bytes = 0
    if config.cluster.gpus_per_worker or _must_grow(config):
        gpu_bytes = _on_a_worker(config, _gpu_bytes)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Resources(
        tuple(
            Node(
                num_cpus=has.get("CPU", 0.0),
                # The object store has a part of a node's memory, and takes it only as it needs it.
                host_bytes=int(has.get("memory", 0) + has.get("object_store_memory", 0)),
                num_gpus=has.get("GPU", 0.0),
                gpu_bytes=gpu_bytes,
            )
            for has in alive
        )
    )


def _on_a_worker(config: JobConfig, look: Callable[..., Any], *arguments: Any) -> Any:
    cluster = config.cluster
    if len(ray.nodes()) == 1 and not cluster.gpus_per_worker and not _must_grow(config):
        return look(*arguments)
    task = ray.remote(look).options(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)
    return ray.get(task.remote(*arguments), timeout=WAIT)


def _gpu_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def _must_grow(config: JobConfig) -> bool:
    """Whether no node takes a worker yet, as on a cluster whose head offers no CPU, but one can be had."""
    return autoscales() and not any(node.slots(config.cluster) for node in nodes())


def product_speed(device: str, dtype: str, num_threads: int) -> float:
    """Operations a second of a matrix product here, the best of a few."""
    rows = 512 if device == "cpu" else 8192
    left = torch.ones(rows, rows, device=device, dtype=getattr(torch, dtype))
    seconds = []
    with _as_models_run(num_threads):
        for _ in range(3):
            started = time.perf_counter()
            (left @ left).sum().item()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return 2.0 * rows**3 / min(seconds)


@contextmanager
def _as_models_run(num_threads: int) -> Iterator[None]:
    """Inside, a worker's threads, and no oneDNN, which loaded models do without."""
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(num_threads)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.mkldnn.enabled = before[1]
