"""Gradient ascent that kills its own process once, in the middle of a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.plugins import Plugin

_calls = 0


class KilledAscent(Plugin):
    name: str = "faulty.killed"
    marker: str
    at_call: int

    def loss(self, forget: Forward) -> dict[str, Tensor]:
        global _calls
        _calls += 1
        if _calls == self.at_call and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"forget": -forget.nll()}
