"""An attribution actor that kills its own process once, in the middle of its third unit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pyarrow as pa

from seuf_ray.stages.attribute import Attributor


def killed_attributor(marker: Path) -> type[Attributor]:
    """A class that Ray sends by value, so that actors know `marker`, the file that says that it has happened."""

    class KilledAttributor(Attributor):
        calls = 0

        def __call__(self, table: pa.Table) -> pa.Table:
            self.calls += 1
            if self.calls == 3 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(table)

    return KilledAttributor
