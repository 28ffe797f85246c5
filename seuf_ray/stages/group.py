"""A Ray Train worker group as the stages use it: processes of one process group, beside the driver's main thread.

Workers put what they have to tell into `settings["queue"]`, and the driver reads it while they run: metrics that go
through `ray.train.report` would reach it at the end only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import ClusterConfig, JobConfig
from seuf_ray.engine.deepspeed_engine import owned_experts
from seuf_ray.model.moe import MoEModel

Settings = dict[str, Any]


class WorkerGroup(threading.Thread):
    """`cluster.num_workers` processes that run `work(settings)`; a group that loses one starts again.

    Args:
        settings: what `work` gets on every worker, besides `queue`.
        name: folder in `output_dir` for what the workers report.
        more: further arguments of TorchTrainer.
    """

    def __init__(
        self, work: Callable[[Settings], Any], settings: Settings, config: JobConfig, name: str, **more: Any
    ) -> None:
        super().__init__(daemon=True)
        self.queue = Queue(actor_options={"num_cpus": 0})
        self.trainer = TorchTrainer(
            work,
            train_loop_config={**settings, "queue": self.queue},
            scaling_config=_scaling(config.cluster),
            torch_config=TorchConfig(timeout_s=1800),
            run_config=_run(config, name),
            **more,
        )
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.trainer.fit()
        except BaseException as error:  # handed to the main thread
            self.error = error

    def messages(self) -> Iterator[Any]:
        """Start the workers and yield what they put into the queue until they end; raises what made them fail."""
        self.start()
        while self.is_alive() or not self.queue.empty():
            try:
                yield self.queue.get(timeout=0.5)
            except Empty:
                continue
        self.queue.shutdown()
        if self.error is not None:
            raise self.error


def _scaling(cluster: ClusterConfig) -> ray.train.ScalingConfig:
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return ray.train.ScalingConfig(
        num_workers=cluster.num_workers,
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker={"CPU": cluster.cpus_per_worker} | gpus,
    )


def _run(config: JobConfig, name: str) -> ray.train.RunConfig:
    environment = {"OMP_NUM_THREADS": str(threads(config.cluster)), "OMP_WAIT_POLICY": "PASSIVE"}
    if not config.cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    return ray.train.RunConfig(
        name=name,
        storage_path=str(config.output_dir.absolute()),
        worker_runtime_env={"env_vars": environment},
        failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
    )


def threads(cluster: ClusterConfig) -> int:
    """Of one worker: a lone local one may use the whole machine; several share it."""
    alone = cluster.num_workers == 1 and cluster.address is None
    return max(1, (os.cpu_count() or 1) if alone else int(cluster.cpus_per_worker))


def worker_model(config: JobConfig, folder: Path, expert_parallel_size: int) -> MoEModel:
    """In a worker: the model on its device, or, on the CPU, with the experts of every layer that are this rank's."""
    rank, checkpoint = ray.train.get_context().get_world_rank(), Checkpoint(folder)
    owned = owned_experts(checkpoint.shape.num_experts, rank, expert_parallel_size)
    device = ray.train.torch.get_device() if config.cluster.gpus_per_worker else torch.device("cpu")
    return MoEModel(checkpoint, getattr(torch, config.model.dtype), device, owned=owned)
