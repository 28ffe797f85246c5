"""Where a run's records can be watched besides the terminal: TensorBoard on the driver, Prometheus in the worker.

    tensorboard --logdir OUTPUT_DIR/tensorboard       every metric of every record, under its own name

    ray_seuf_step                                     optimiser steps taken
    ray_seuf_forget_accuracy, ray_seuf_utility        of the small evaluation
    ray_seuf_loss{term=}                              forget, retain, anchor, total
    ray_seuf_gradient_norm                            before clipping
    ray_seuf_routing_overlap{tokens=}                 first choices kept on forget or retain probes, mean of all layers
    ray_seuf_routing_kl{tokens=}                      KL to the original's routing there, mean of all layers

Ray serves the gauges on each node's metrics port, beside its own, all with `run` = the job's name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from seuf_ray.unlearning import Progress

Reading = tuple[str, dict[str, str], float]  # gauge, tags besides the run's, value
PLAIN = {"forget_accuracy": "forget_accuracy", "utility": "utility", "grad_norm": "gradient_norm"}
MEANS = {"overlap_top1": "routing_overlap", "kl": "routing_kl"}
GAUGES = {
    "step": "optimiser steps taken",
    "forget_accuracy": "share of forget questions answered right in the small evaluation",
    "utility": "share of utility questions answered right in the small evaluation",
    "loss": "terms of the loss, and their sum",
    "gradient_norm": "of the plan's tensors, before clipping",
    "routing_overlap": "share of tokens that keep their first expert, mean over layers",
    "routing_kl": "KL of routing to the original's, nats per token, mean over layers",
}
TAGS = {"loss": ("run", "term"), "routing_overlap": ("run", "tokens"), "routing_kl": ("run", "tokens")}


class TensorBoard:
    """Scalars of one run in `folder`; a run that is taken up again hides the later points of the one before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._step = -1

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def show(self, progress: Progress) -> None:
        """One record."""
        if self._writer is None or progress.step <= self._step:  # a worker went back to its last checkpoint
            self._open(progress.step)
        self._step = progress.step
        for name, value in progress.metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, progress.step)

    def _open(self, step: int) -> None:
        from tensorboardX import SummaryWriter  # comes with ray[tune]; 0.5 s that only a run needs to wait

        self.__exit__()
        order = f".{time.time_ns()}"  # TensorBoard reads files by name, and names know seconds only
        self._writer = SummaryWriter(str(self.folder), purge_step=step, flush_secs=2, filename_suffix=order)


class Gauges:
    """This process's gauges of one run; one rank's are enough."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(f"seuf_{name}", description=text, tag_keys=TAGS.get(name, ("run",)))
            for name, text in GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def show(self, progress: Progress) -> None:
        """One record."""
        for name, tags, value in readings(progress):
            if math.isfinite(value):
                self._gauges[name].set(value, tags=tags)


def readings(progress: Progress) -> Iterator[Reading]:
    """What a record says to the gauges."""
    metrics = progress.metrics
    yield "step", {}, progress.step
    for key, value in metrics.items():
        if key in PLAIN:
            yield PLAIN[key], {}, value
        elif key.startswith("loss/"):
            yield "loss", {"term": key.removeprefix("loss/")}, value
    for figure, name in MEANS.items():
        for tokens in ("forget", "retain"):
            yield name, {"tokens": tokens}, _mean(metrics, f"{figure}/{tokens}/")


def _mean(metrics: Mapping[str, float], prefix: str) -> float:
    values = [value for key, value in metrics.items() if key.startswith(prefix)]
    return sum(values) / len(values) if values else math.nan
