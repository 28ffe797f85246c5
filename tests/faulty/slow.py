"""Gradient ascent that takes its time and says where, so that somebody can kill the driver or the node meanwhile."""

from __future__ import annotations

import time
from pathlib import Path

import ray
from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.plugins import Plugin


class SlowAscent(Plugin):
    name: str = "faulty.slow"
    seconds: float = 0.0
    notes: str | None = (
        None  # a folder that gets a file for each node that takes a step, called like the node
    )

    def loss(self, forget: Forward) -> dict[str, Tensor]:
        if self.notes is not None:
            (Path(self.notes) / ray.get_runtime_context().get_node_id()).touch()
        time.sleep(self.seconds)
        return {"forget": -forget.nll()}
