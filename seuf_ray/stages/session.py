"""A Ray session for a job: the cluster it was submitted to, the address it names, or a local one of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from seuf_ray.config import ClusterConfig
from seuf_ray.errors import ConfigError
from seuf_ray.resources import Node, autoscales, require_slots

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # ray.train.report waits for one such poll
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

LOCAL = {  # a laptop's Ray
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its terminal; clusters keep their logs
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes its node away: a process less for each group
}


@contextmanager
def session(cluster: ClusterConfig) -> Iterator[None]:
    """Connect to Ray, check that the job's resources exist, and stop what was started here."""
    started = not ray.is_initialized()
    if started:
        for key, value in DEFAULTS.items():
            os.environ.setdefault(key, value)
        arguments = _arguments(cluster)
        if arguments.get("address") == "local":
            for key, value in LOCAL.items():
                os.environ.setdefault(key, value)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.init(**arguments)
    try:
        require(cluster)
        yield
    finally:
        if started:
            ray.shutdown()


def _arguments(cluster: ClusterConfig) -> dict[str, Any]:
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}  # a submitted job: whatever we pass would clash with the submission's runtime environment
    if cluster.address or os.environ.get("RAY_ADDRESS"):
        return {"address": cluster.address, "log_to_driver": False}
    # Logical CPUs are free to choose, and a local job must never wait for one.
    needed = int(cluster.num_workers * cluster.cpus_per_worker) + 2
    return {
        "address": "local",  # never a cluster that happens to run here: say RAY_ADDRESS=auto for that
        "num_cpus": max(needed, os.cpu_count() or 1),
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "error",
    }


def require(cluster: ClusterConfig) -> None:
    """Refuse a request that can never be placed; Ray itself would wait for it for ever.

    Raises:
        ConfigError: with what is needed and what there is. A cluster that autoscales is given the benefit of doubt.
    """
    if autoscales():
        return
    there = ray.cluster_resources()
    for name, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        needed = each * cluster.num_workers
        if needed > there.get(name, 0.0):
            raise ConfigError(
                f"cluster.num_workers = {cluster.num_workers} needs {needed:g} {name} "
                f"({each:g} each), the Ray cluster has {there.get(name, 0.0):g} "
                "(on a cluster that autoscales, set RAY_CLUSTER_AUTOSCALES=1)"
            )
    require_slots(nodes(), cluster)


def nodes() -> list[Node]:
    """The nodes that there are now; their memory is not asked for here."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(has.get("CPU", 0.0), 0, has.get("GPU", 0.0)) for has in alive]
