"""Attribution by a Ray Train worker group that shares one copy of the experts: for models that fit no single worker.

Each rank takes units from its shard of the dataset as it gets on with them, and sends the result of each to the driver,
whose ledgers count it once. A group that loses a worker starts again from the first unit; what came before the loss
stays, and is not counted again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import torch
from ray.util.queue import Queue

from seuf_ray import config as configs
from seuf_ray.attribution.bootstrap import Bootstrap
from seuf_ray.attribution.results import results_in_step
from seuf_ray.attribution.units import Record
from seuf_ray.engine.deepspeed_engine import shard_experts
from seuf_ray.errors import ConfigError, MismatchError
from seuf_ray.job import Job
from seuf_ray.stages.data import as_data_errors, require_room
from seuf_ray.stages.group import Settings, WorkerGroup, worker_model

GROUP = "attribution_group"  # Ray Train's own folder in output_dir while the group runs


class EveryUnit(ray.train.DataConfig):
    """Every unit goes to some rank; Ray Train's own split would leave out what makes shards unequal."""

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: Any,
        **_: Any,
    ) -> list[dict[str, ray.data.DataIterator]]:
        shards = {
            name: dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for name, dataset in datasets.items()
        }
        return [{name: shard[rank] for name, shard in shards.items()} for rank in range(world_size)]


def through_group(job: Job, units: ray.data.Dataset, bootstraps: Mapping[str, Bootstrap]) -> Iterator[Record]:
    """The result record of every unit, in any order; some twice if a worker was lost.

    Raises:
        ConfigError: the workers cannot be placed beside the tasks that feed them.
        DataError: a source cannot be read, or has too many malformed rows.
    """
    cluster, folder = job.config.cluster, job.path(GROUP)
    require_room("cluster.num_workers", cluster.num_workers, cluster)
    settings = {
        "config": job.config.model_dump(mode="json"),
        "folder": str(job.checkpoint.folder),
        "pad_id": job.pad_id,
        "bootstraps": dict(bootstraps),
    }
    shutil.rmtree(folder, ignore_errors=True)
    fed = {"datasets": {"units": units}, "dataset_config": EveryUnit()}
    mistakes = []
    for message in WorkerGroup(_work, settings, job.config, GROUP, **fed).messages():
        if isinstance(message, Exception):
            mistakes.append(message)
        else:
            yield message
    shutil.rmtree(folder, ignore_errors=True)
    if mistakes:
        raise mistakes[0]


def _work(settings: Settings) -> None:
    """One worker: its experts, and units as long as there are any."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config, queue = configs.validate(settings["config"]), settings["queue"]
    parallel = config.cluster.expert_parallel_size
    model = worker_model(config, Path(settings["folder"]), parallel)
    shard_experts(model, parallel)
    units = _readable(ray.train.get_dataset_shard("units").iter_rows(), queue)
    for result in results_in_step(model, units, settings["bootstraps"], settings["pad_id"]):
        queue.put(result)


def _readable(units: Iterable[Record], queue: Queue) -> Iterator[Record]:
    """`units` up to a mistake in the data; the driver is told of it, and no group starts again only to meet it."""
    try:
        with as_data_errors():
            yield from units
    except (ConfigError, MismatchError) as error:
        queue.put(error)
