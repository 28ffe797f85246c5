"""Gradient ascent that takes its time, so that somebody can kill the driver meanwhile."""

from __future__ import annotations

import time

from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.plugins import Plugin


class SlowAscent(Plugin):
    name: str = "faulty.slow"
    seconds: float = 0.0

    def loss(self, forget: Forward) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        return {"forget": -forget.nll()}
