"""A script: attribution on two nodes of one machine, one of which is lost on the way; says what there was to lose.

python lost_node.py JOB.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

import seuf_ray.stages.attribute as stage
from seuf_ray.config import validate
from seuf_ray.console import Meter
from seuf_ray.job import Job

UNITS_BEFORE = 4
FAST = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 500,
}


class Watched(Meter):
    """Says when some units are done; the rest waits until the node is gone."""

    units, reached, lost = 0, threading.Event(), threading.Event()

    def count(self, tokens: int, data: str, share: float) -> None:
        Watched.units += 1
        if Watched.units == UNITS_BEFORE:
            Watched.reached.set()
            Watched.lost.wait(120)
        super().count(tokens, data, share)


def wait_for_actors(node_id: str, seconds: float = 60.0) -> list[dict[str, Any]]:
    """The actors that live there; on a busy machine the first one does its units before the second has started."""
    for _ in range(int(seconds)):
        actors = ray._private.state.actors().values()
        if found := [a for a in actors if a["State"] == "ALIVE" and a["Address"]["NodeID"] == node_id]:
            return found
        time.sleep(1.0)
    return []


def two_nodes(head_cpus: int) -> tuple[Cluster, Any]:
    """A cluster whose head this process is connected to, and its other node, of one CPU."""
    shared = {"include_dashboard": False, "object_store_memory": 100 << 20, "_system_config": FAST}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, **shared})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    return cluster, node


def main() -> None:
    cluster, node = two_nodes(head_cpus=2)
    job = Job(validate(json.loads(Path(sys.argv[1]).read_text())))
    stage.Meter = Watched  # type: ignore[misc]
    thread = threading.Thread(target=stage.attribute, args=[job], daemon=True)
    thread.start()
    assert Watched.reached.wait(120), "attribution did not begin"
    nodes = {state["NodeID"] for state in ray.nodes() if state["Alive"]}
    on_node = wait_for_actors(node.node_id)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    Watched.lost.set()
    thread.join(200)
    found = {"nodes": len(nodes), "actors_lost": len(on_node)}
    Path(sys.argv[2]).write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
