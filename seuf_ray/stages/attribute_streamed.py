"""Attribution by one task that reads the model layer by layer: for models that fit nowhere (`streaming.py`).

The task reads its units itself, so they never pass the driver; one that is lost starts again from the first layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ray
import ray.data
import torch
from ray.util.queue import Queue

from seuf_ray.attribution.bootstrap import Bootstrap
from seuf_ray.attribution.statistics import RoutingStatistics
from seuf_ray.attribution.streaming import HiddenStates, Unit, stream
from seuf_ray.attribution.units import Record, account, unit_batch
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.console import show_layer
from seuf_ray.job import Job
from seuf_ray.model.loading import Weights
from seuf_ray.outputs import clear_cache
from seuf_ray.stages.group import threads

Bootstraps = Mapping[str, Bootstrap]
Found = tuple[dict[str, RoutingStatistics], list[Record]]


def through_layers(job: Job, units: ray.data.Dataset, bootstraps: Bootstraps) -> Found:
    """The sums of each set that has tokens, and the accounts of all units."""
    config, cluster = job.config, job.config.cluster
    spill = job.cache_dir / "hidden"
    settings = {
        "folder": job.checkpoint.folder,
        "dtype": config.model.dtype,
        "pad_id": job.pad_id,
        "device": "cuda" if cluster.gpus_per_worker else "cpu",
        "hidden_bytes": config.attribution.hidden_bytes,
        "spill": spill,
        "num_threads": threads(cluster),
    }
    queue = Queue(actor_options={"num_cpus": 0})
    task = ray.remote(_stream).options(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)
    try:
        return _wait(task.remote(units, dict(bootstraps), settings, queue), queue)
    finally:
        queue.shutdown()
        clear_cache(job)


def _wait(reference: ray.ObjectRef, queue: Queue) -> Found:
    """The task's result; shows each layer meanwhile."""
    is_done = False
    while not is_done:
        is_done = bool(ray.wait([reference], timeout=1.0)[0])
        for step in queue.get_nowait_batch(queue.qsize()):
            show_layer(*step)
    found: Found = ray.get(reference)
    return found


def _stream(units: ray.data.Dataset, bootstraps: Bootstraps, settings: dict[str, Any], queue: Queue) -> Found:
    """In the task."""
    torch.set_num_threads(settings["num_threads"])
    weights = Weights(Checkpoint(settings["folder"]), getattr(torch, settings["dtype"]))
    hidden = HiddenStates(settings["hidden_bytes"], settings["spill"])
    accounts: list[Record] = []
    num_tokens = 0

    def batches() -> Iterator[Unit]:
        nonlocal num_tokens
        for record in units.iter_rows():
            accounts.append(account(record))
            num_tokens += len(record["tokens"])
            if (unit := unit_batch(record, bootstraps[record["data"]], settings["pad_id"])) is not None:
                yield record["data"], *unit

    def show(*step: Any) -> None:
        queue.put((*step, num_tokens, weights.bytes_read))

    return stream(weights, batches(), hidden, settings["device"], show), accounts
