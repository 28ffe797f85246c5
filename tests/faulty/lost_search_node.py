"""A script: a search on two nodes of one machine, one of which is lost in the middle of a trial and not replaced.

python lost_search_node.py JOB.json REPORT.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray
from ray._private.ray_constants import PROCESS_TYPE_RAYLET

from faulty.lost_node import two_nodes
from seuf_ray.artifacts import AttributionReport
from seuf_ray.config import validate
from seuf_ray.outputs import claim
from seuf_ray.search.outcome import SEARCHED, finish_search, prepare_search
from seuf_ray.stages.search import search


def kill_when_a_trial_runs_there(raylet: int, note: Path) -> None:
    while not note.exists():
        time.sleep(0.05)
    os.kill(raylet, signal.SIGKILL)
    note.with_name("killed").touch()


def main() -> None:
    config = validate(json.loads(Path(sys.argv[1]).read_text()))
    job = prepare_search(config)
    claim(config, *SEARCHED)
    report = job.read(AttributionReport, "attribution.json", Path(sys.argv[2]))
    cluster, node = two_nodes(head_cpus=1)
    raylet = node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid
    note = Path(config.algorithm.notes) / node.node_id  # type: ignore[attr-defined]
    threading.Thread(target=kill_when_a_trial_runs_there, args=(raylet, note), daemon=True).start()
    finish_search(job, report, search(job, report))
    assert [state["Alive"] for state in ray.nodes()].count(True) == 1
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
