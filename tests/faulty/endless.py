"""Gradient ascent that kills its own process in every step."""

from __future__ import annotations

import os
import signal

from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.plugins import Plugin


class EndlessAscent(Plugin):
    name: str = "faulty.endless"

    def loss(self, forget: Forward) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {"forget": -forget.nll()}
