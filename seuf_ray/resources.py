"""What a cluster has for the processes of a job: memory of nodes and GPUs, and what each process gets of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from seuf_ray.checkpoint.sizes import readable
from seuf_ray.config import ClusterConfig
from seuf_ray.errors import ConfigError


@dataclass(frozen=True)
class Memory:
    """Bytes on a node, and on an accelerator (0: none is used)."""

    host: int
    device: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.host + other.host, self.device + other.device)

    def fits(self, other: Memory) -> bool:
        return self.host <= other.host and self.device <= other.device

    def __str__(self) -> str:
        return readable(self.host) + (f" and {readable(self.device)} on the GPU" if self.device else "")


@dataclass(frozen=True)
class Node:
    """One machine of a cluster: what Ray may use of it, and the memory of one of its GPUs."""

    num_cpus: float
    host_bytes: int
    num_gpus: float = 0.0
    gpu_bytes: int = 0

    def slots(self, cluster: ClusterConfig) -> int:
        """Workers or actors that it takes at once."""
        wanted = ((self.num_cpus, cluster.cpus_per_worker), (self.num_gpus, cluster.gpus_per_worker))
        return min(int(has / each + 1e-9) for has, each in wanted if each)  # 1 // 0.1 is 9

    def __str__(self) -> str:
        return f"{self.num_cpus:g} CPU" + (f" and {self.num_gpus:g} GPU" if self.num_gpus else "")


@dataclass(frozen=True)
class Resources:
    """What there is to run on.

    Attributes:
        nodes: of the cluster.
        flops: operations a second of a matrix product in `model.dtype` on what a worker computes with, if measured.
    """

    nodes: tuple[Node, ...]
    flops: float | None = None

    def share(self, processes: int, cluster: ClusterConfig) -> Memory:
        """Memory of each of `processes` workers or actors, wherever they are placed: packed on the smallest node.

        Raises:
            ConfigError: no node takes even one.
        """
        shares = [
            Memory(
                node.host_bytes // min(processes, slots),
                int(node.gpu_bytes * min(1.0, cluster.gpus_per_worker)),
            )
            for node in self.nodes
            if (slots := node.slots(cluster))
        ]
        if not shares:
            raise ConfigError(
                f"no node has {cluster.cpus_per_worker:g} CPU and {cluster.gpus_per_worker:g} GPU for one worker "
                "(cluster.cpus_per_worker, cluster.gpus_per_worker)"
            )
        return Memory(min(share.host for share in shares), min(share.device for share in shares))


def autoscales() -> bool:
    """Whether the cluster grows when a job asks: then what is there now says nothing of what the job can have."""
    return "RAY_CLUSTER_AUTOSCALES" in os.environ


def require_slots(nodes: Sequence[Node], cluster: ClusterConfig) -> int:
    """How many workers find room at once; a worker has its node's resources, never parts of two nodes'.

    Raises:
        ConfigError: fewer than one group has; Ray would wait for another node for ever.
    """
    slots = sum(node.slots(cluster) for node in nodes)
    if slots < cluster.num_workers:
        there = ", ".join(f"{count} of {node}" for node, count in Counter(map(str, nodes)).items())
        worker = Node(cluster.cpus_per_worker, 0, cluster.gpus_per_worker)
        raise ConfigError(
            f"cluster.num_workers = {cluster.num_workers} of {worker} each (cluster.cpus_per_worker, "
            f"cluster.gpus_per_worker): the Ray cluster's nodes ({there}) have room for {slots} "
            "(on a cluster that autoscales, set RAY_CLUSTER_AUTOSCALES=1)"
        )
    return slots
