"""Trials on Ray Tune: a worker group that keeps the base in memory and is handed one trial after another.

Tune reuses the group's actor (`reset_config`); with several workers that actor is rank 0, and the other ranks are
actors of its own in the same placement group. Every rank runs the whole trial and comes to the same decisions, so all
that Tune has to pass on is which trial it is.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import traceback
from collections.abc import Generator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import tune
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors.torch import save_file

from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import ClusterConfig
from seuf_ray.engine.deepspeed_engine import owned_experts, shard_experts
from seuf_ray.model.moe import MoEModel
from seuf_ray.search.objectives import is_result
from seuf_ray.search.resident import Base, Moment, Resident, process_name
from seuf_ray.search.schedule import Trial, tensors_path

TIMEOUT = timedelta(minutes=30)  # of one exchange between ranks


class TrialWorker(tune.Trainable):
    """Rank 0 of a worker group; one call of `step` is one small evaluation of the current trial."""

    peers: Sequence[Any] = ()  # the other ranks
    resident: Resident | None = None
    moments: Generator[Moment] | None = None  # of the current trial, once it has begun

    def setup(self, config: dict[str, Any], base: Base, folder: str) -> None:
        """Nothing is loaded yet; `folder` gets the trained tensors."""
        self.base, self.folder, self.trial = base, Path(folder), read_trial(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial for the same base."""
        if self.moments is not None:
            self.moments.close()
        self.trial, self.moments = read_trial(new_config), None
        return True

    def _load(self) -> Resident:
        """The base, in the first step: to Tune the group is up by then.

        Tune gives the trial of a group that is still starting to whichever group is free first, stops the starting one
        and starts another: with trials shorter than loading there would never be a second group.
        """
        size = self.base.config.cluster.num_workers
        if size > 1:
            reference, address = ray.put(self.base), _free_address()
            self.peers = [_peer(self.base.config.cluster, rank) for rank in range(1, size)]
            for peer in self.peers:
                peer.start.remote(reference, address)
            join(0, self.base.config.cluster, address)
        return load_resident(self.base, 0)

    def _begin(self) -> Generator[Moment]:
        self.resident = self.resident or self._load()
        self.others = [peer.run.remote(self.trial) for peer in self.peers]
        return self.resident.run(self.trial)

    def step(self) -> dict[str, Any]:
        self.moments = self.moments or self._begin()
        moment = next(self.moments)
        told = {"step": moment.step, "metrics": moment.metrics, "done": moment.record is not None}
        if moment.record is None:
            return told
        if is_result(moment.record):
            save_tensors(tensors_path(self.folder, moment.record.number), moment.tensors)
        self.moments.close()
        ray.get(self.others)
        return {**told, "record": moment.record.model_dump_json()}

    def cleanup(self) -> None:
        for peer in self.peers:
            ray.kill(peer)


class Peer:
    """Another rank of a worker group, for as long as rank 0 lives."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, base: Base, address: str) -> None:
        """Join the others and load this rank's share of the base."""
        with _or_leave():
            join(self.rank, base.config.cluster, address)
            self.resident = load_resident(base, self.rank)

    def run(self, trial: Trial) -> None:
        """The same trial as rank 0, at the same time."""
        with _or_leave():
            for _ in self.resident.run(trial):
                pass


class _or_leave:
    """A rank that fails leaves at once: the others would wait for it, but notice a closed connection."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            traceback.print_exception(error)
            os._exit(1)


def _peer(cluster: ClusterConfig, rank: int) -> Any:
    """An actor in the bundle of this rank of the trial's own placement group."""
    group = get_current_placement_group()
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    options = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker}
    return ray.remote(Peer).options(scheduling_strategy=place, max_concurrency=1, **options).remote(rank)


def join(rank: int, cluster: ClusterConfig, address: str) -> None:
    """Make this process a rank of the group that meets at `address`."""
    host, port = address.rsplit(":", 1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(cluster.num_workers),
        LOCAL_RANK="0",
        MASTER_ADDR=host,
        MASTER_PORT=port,
    )
    if not cluster.gpus_per_worker:
        os.environ["DS_ACCELERATOR"] = "cpu"
    backend = "nccl" if cluster.gpus_per_worker else "gloo"
    dist.init_process_group(
        backend, f"tcp://{address}", rank=rank, world_size=cluster.num_workers, timeout=TIMEOUT
    )


def _free_address() -> str:
    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def load_resident(base: Base, rank: int) -> Resident:
    """In a worker: this rank's share of the base, on its device."""
    cluster, checkpoint = base.config.cluster, Checkpoint(base.folder)
    torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    owned = owned_experts(checkpoint.shape.num_experts, rank, cluster.expert_parallel_size)
    device = "cuda" if cluster.gpus_per_worker else "cpu"
    model = MoEModel(checkpoint, getattr(torch, base.config.model.dtype), device, owned=owned)
    shard_experts(model, cluster.expert_parallel_size)
    return Resident(base, model, spill_folder(base))


def spill_folder(base: Base) -> Path | None:
    """A folder for this process alone: hosts share a disk, and after a kill a process's number is given again."""
    name = f"{process_name().replace(':', '-')}-{secrets.token_hex(4)}"
    return base.cache_dir / name if base.cache_dir else None


def bundles(cluster: ClusterConfig) -> tune.PlacementGroupFactory:
    """One bundle for each rank; the driver of a trial is rank 0 itself and takes nothing besides."""
    each = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        each["GPU"] = cluster.gpus_per_worker
    return tune.PlacementGroupFactory([each] * cluster.num_workers)


def write_trial(trial: Trial) -> dict[str, Any]:
    """A trial as a configuration of Tune's, which would read paths with dots as nested tables."""
    return {"number": trial.number, "trial": json.dumps(asdict(trial))}


def read_trial(config: dict[str, Any]) -> Trial:
    """What `write_trial` wrote."""
    values = json.loads(config["trial"])
    return Trial(
        values["number"], values["assignment"], {int(rung): cut for rung, cut in values["cuts"].items()}
    )


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Written aside and renamed; what is left of it after a kill `outcome.sweep` removes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    save_file(tensors, aside)
    aside.replace(path)
