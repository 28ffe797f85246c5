"""The base that stays in memory while trials come and go: a trial is a small patch to one big model.

    resident   frozen model, tokenised data, attribution report, and what frozen layers make of every batch
    a trial    derive the job -> plan -> overlay, optimizer, seed -> the loop -> tensors -> take the overlay off again

A trial ends with the same bits as alone in a fresh process: the model is as it was, bit for bit, when the next one
begins, what is cached is constant, and a step is a function of parameters, seed and its number.
"""

from __future__ import annotations

import functools
import math
import os
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from seuf_ray import unlearning
from seuf_ray.artifacts import AttributionReport, TrialPoint, TrialRecord, UnlearningPlan
from seuf_ray.attribution.selection import plan_for
from seuf_ray.config import JobConfig
from seuf_ray.engine import Engine, LocalEngine
from seuf_ray.engine.ranks import mean_over_ranks
from seuf_ray.engine.replicated import ReplicatedEngine
from seuf_ray.errors import ConfigError, MismatchError
from seuf_ray.model.moe import MoEModel
from seuf_ray.model.spans import ConstantCache
from seuf_ray.monitor import Task
from seuf_ray.passes import Targets
from seuf_ray.search import objectives
from seuf_ray.search.halving import Judge
from seuf_ray.search.schedule import Trial
from seuf_ray.search.spaces import derive_trial
from seuf_ray.unlearning import Progress


@dataclass(frozen=True)
class Base:
    """What all trials of a search share.

    Attributes:
        config: the search's job.
        folder: of the checkpoint.
        report: whose experts trials choose their targets from.
        task: rows and questions.
        cache_dir: where processes put what memory cannot hold; the driver's to remove.
    """

    config: JobConfig
    folder: Path
    report: AttributionReport
    task: Task
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Moment:
    """One small evaluation of a trial; the last one has its record, and the trained tensors if there are any."""

    step: int
    metrics: dict[str, float]
    record: TrialRecord | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)


class Resident:
    """One process's share of a worker group that runs trials.

    Args:
        base: what trials share.
        model: frozen, on this process's device; experts may be sharded over the process group, if there is one.
        spill: folder for what the cache cannot hold in memory.
    """

    def __init__(self, base: Base, model: MoEModel, spill: Path | None = None) -> None:
        self.base, self.model = base, model
        agree = functools.partial(mean_over_ranks, device=model.device) if _in_group() else int
        self.cache = ConstantCache(base.config.engine.prefix_cache_bytes, spill, agree)

    def run(self, trial: Trial) -> Generator[Moment]:
        """The trial's small evaluations; whatever happens, the base is as it was afterwards.

        A trial that cannot be carried out with its values is a result, not an error.
        """
        started = time.perf_counter()
        notes = _Notes(trial, started)
        try:
            config = derive_trial(self.base.config, trial.assignment)
            plan = plan_for(config, self.base.report, self.model.checkpoint)
            yield from self._train(config, plan, notes)
        except (ConfigError, MismatchError) as error:
            yield Moment(notes.step, {}, notes.record("refused", str(error)))

    def _train(self, config: JobConfig, plan: UnlearningPlan, notes: _Notes) -> Generator[Moment]:
        targets = Targets.of(plan, self.model.shape)
        judge = Judge(notes.trial.cuts, self.base.config.search)
        with self.engine(config, plan) as engine:
            for progress in unlearning.run(engine, config, targets, self.base.task):
                figures = notes.see(progress)
                ended = progress.kept is not None
                cut = None if ended else judge.judge(progress.step, figures)
                if not ended and cut is None:
                    yield Moment(progress.step, progress.metrics)
                    continue
                record = notes.record("stopped", cut) if cut else notes.last(progress)
                yield Moment(progress.step, progress.metrics, record, engine.tensors())
                return

    @contextmanager
    def engine(self, config: JobConfig, plan: UnlearningPlan) -> Iterator[Engine]:
        """An engine over the base, and the base as it was afterwards."""
        self.cache.renew()
        torch.manual_seed(config.seed)  # for plug-ins that draw from torch's own generator
        kind = ReplicatedEngine if _in_group() else LocalEngine
        engine = kind(self.model, plan, config.training, config.engine, cache=self.cache)
        try:
            yield engine
        finally:
            engine.detach()


def process_name() -> str:
    """This process among those of a cluster, whose hosts give the same numbers."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Notes:
    """What is written down of a trial on its way."""

    def __init__(self, trial: Trial, started: float) -> None:
        self.trial, self.started, self.step = trial, started, 0
        self.curve: list[TrialPoint] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def see(self, progress: Progress) -> dict[str, float]:
        """The figures of a small evaluation."""
        figures = objectives.figures(progress.metrics)
        self.step, self.metrics[progress.step] = progress.step, progress.metrics
        if all(map(math.isfinite, figures.values())):
            self.curve.append(TrialPoint(step=progress.step, figures=figures))
        return figures

    def last(self, progress: Progress) -> TrialRecord:
        """Of a trial that came to its end; one that lost itself in the infinite says so."""
        if not all(map(math.isfinite, _vital(progress.metrics))):
            return self.record("diverged", progress.stopped or "a loss is no number")
        self.step = progress.step if progress.kept is None else progress.kept
        return self.record("finished", progress.stopped or "")

    def record(self, status: str, why: str | None) -> TrialRecord:
        metrics = {name: v for name, v in self.metrics.get(self.step, {}).items() if name != "seconds"}
        figures = objectives.figures(metrics) if metrics else {}
        return TrialRecord(
            number=self.trial.number,
            assignment=self.trial.assignment,
            status=status,
            why=why or "",
            step=self.step,
            figures=_finite(figures),
            metrics=_finite(metrics),
            curve=self.curve,
            seconds=time.perf_counter() - self.started,
            worker=process_name(),
        )


def _vital(metrics: dict[str, float]) -> list[float]:
    return [v for name, v in metrics.items() if name.startswith(("loss/", "nll/")) or name == "grad_norm"]


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
