"""The loop: passes -> terms -> step. A plain generator of progress; it knows neither Ray nor DeepSpeed.

    terms = algorithm.loss(forget, retain, forget_ref, ...) | anchor.loss(targets, ...)
    loss  = sum of terms

The parameter names of the two losses say which passes run, so gradient ascent without an anchor runs one and NPO two.
Reference passes come first and leave no graph. Every `training.evaluate_every` steps a small evaluation asks a fixed
choice of questions and compares the routing of a fixed set of rows with the original's.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seuf_ray.config import JobConfig, TrainingConfig
from seuf_ray.constraint import constrain
from seuf_ray.data.batches import Sampler, micro_batches
from seuf_ray.data.rows import Row
from seuf_ray.diagnosis import in_words, where_passes_broke
from seuf_ray.engine import Engine
from seuf_ray.errors import ConfigError, did_you_mean
from seuf_ray.guards import Keeper
from seuf_ray.monitor import Monitor, Task
from seuf_ray.passes import Batch, Counts, Targets
from seuf_ray.plugins import Plugin, Reads
from seuf_ray.telemetry import Telemetry, with_reference

SETS = ("forget", "retain", "idk")  # of rows: a pass is over one of them, with _ref by the original
Saved = dict[str, Any]  # what a run needs to go on: step, seconds, engine state, the keeper's best


@dataclass(frozen=True)
class Progress:
    """One small evaluation.

    Attributes:
        step: optimiser steps taken.
        metrics: loss terms, gradient norm, accuracies, routing drift.
        stopped: why the run ended, on the last record only, if not for its number of steps.
        kept: the step whose tensors are the result, on the last record only.
        save: makes a copy of everything that `run` needs to go on from here.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    kept: int | None = None
    save: Callable[[], Saved] | None = field(default=None, compare=False, repr=False)


def run(
    engine: Engine, config: JobConfig, targets: Targets, task: Task, saved: Saved | None = None
) -> Iterator[Progress]:
    """Train until `training.steps`, the forget-accuracy floor, a guard, or a non-finite loss.

    A step is a pure function of the parameters, the seed and its number, so a run that goes on from `saved` ends
    with the same bits as one that was never interrupted.
    """
    steps, monitor = Steps(engine, config, targets, task), Monitor(engine, task, targets)
    keeper, constraint = Keeper(engine, config.guards), constrain(engine, config, targets, task)
    start, clock = 0, 0.0
    if saved is not None:
        start, clock = saved["step"], saved["seconds"]
        engine.load_state(saved["engine"])
        keeper.load(saved["keeper"])

    def report(step: int, metrics: dict[str, float], broken: str | None = None) -> Progress:
        reason = broken or _floor_reached(metrics, config.training, step)
        taken = (
            step if broken is None else step - 1
        )  # a broken step is not taken; the one before may be to blame
        violated = keeper.judge(taken, metrics)
        is_last = step == config.training.steps or (reason or violated) is not None
        kept = keeper.finish(taken, violated) if is_last else None

        def save() -> Saved:
            return {"step": step, "seconds": clock, "engine": engine.state(), "keeper": keeper.state()}

        return Progress(step, metrics, reason or violated, kept, save)

    if saved is None:
        progress = report(0, monitor.measure() | constraint)
        yield progress
        if progress.stopped is not None:
            return
    for step in range(start + 1, config.training.steps + 1):
        started = time.perf_counter()
        terms, norm = steps.take(step)
        clock += time.perf_counter() - started
        broken = _broken(terms, norm, step, steps.origin)
        if broken or step % config.training.evaluate_every == 0 or step == config.training.steps:
            figures = terms | {"grad_norm": norm, "seconds": clock} | steps.telemetry.collect()
            progress = report(step, monitor.measure() | figures, broken)
            yield progress
            if progress.stopped is not None:
                return


class Steps:
    """One optimiser step after another, a pure function of seed and step number."""

    def __init__(self, engine: Engine, config: JobConfig, targets: Targets, task: Task) -> None:
        self.engine, self.config, self.targets, self.task = engine, config, targets, task
        size = config.training.batch_size
        self.samplers = {
            "forget": Sampler(len(task.forget), size, seed=2 * config.seed),
            "retain": Sampler(len(task.retain), size, seed=2 * config.seed + 1),
        }
        self.samplers["idk"] = self.samplers["forget"]  # row for row
        reads = reads_of([config.algorithm, config.anchor], targets)
        self.reads = with_reference(reads, targets, config.telemetry)
        self.telemetry = Telemetry(engine, targets, config.telemetry)
        self.origin = ""  # of the first number that was not finite

    def take(self, step: int) -> tuple[dict[str, float], float]:
        """The terms' values over the whole batch, and the gradient norm before clipping."""
        parts = self._parts(step)
        counts = {name: self.engine.counts(batches) for name, batches in parts.items()}
        number = max(len(batches) for batches in parts.values())
        sums: dict[str, float] = {}
        self.telemetry.begin(step)
        for at in range(number):
            loss, values = self._part({name: batches[at] for name, batches in parts.items()}, counts)
            sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
            if not math.isfinite(values["loss/total"]):
                return sums, math.nan
            self.engine.backward(loss, last=at == number - 1)
        self.telemetry.end()
        norm = self.engine.step(learning_rate(self.config.training, step))
        if not math.isfinite(norm):
            self.origin = f"in the gradient of {in_words(self.engine.broken_gradients())}"
        return sums, norm

    def _parts(self, step: int) -> dict[str, list[Batch]]:
        """This rank's micro-batches of each set that a loss reads; every rank has the same number of them."""
        parts = {}
        for name in sorted(sets_of(self.reads)):
            number = self.samplers[name].batch(step - 1)
            rows: list[Row] = getattr(self.task, name)
            chosen = [rows[i] for i in self.samplers[name].rows(number)]
            size = self.config.engine.micro_batch_size or self.config.training.batch_size
            # The name says which rows: an engine may see other seeds and batch sizes in its next trial.
            key = (name, self.config.seed, self.config.training.batch_size, number)
            parts[name] = micro_batches(
                chosen, self.engine.rank, self.engine.world_size, self.task.pad_id, size, *key
            )
        longest = max(len(batches) for batches in parts.values())
        for batches in parts.values():
            batches += [batches[-1].filler().named(batches[-1].key, "filler")] * (longest - len(batches))
        return parts

    def _part(
        self, batches: Mapping[str, Batch], counts: Mapping[str, Counts]
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of one micro-batch of each set, and what its terms are over all ranks."""
        passes = self._passes(batches, counts)
        anchor = _call(self.config.anchor, passes)
        self.telemetry.observe(passes, anchor)
        terms = _call(self.config.algorithm, passes) | anchor
        values = self._values(terms)
        if not math.isfinite(values["loss/total"]):
            self.origin = where_passes_broke(passes, self.engine.total)
        return torch.stack(list(terms.values())).sum(), values

    def _passes(self, batches: Mapping[str, Batch], counts: Mapping[str, Counts]) -> dict[str, object]:
        passes: dict[str, object] = {"targets": self.targets, "seed": self.config.seed}
        for name in sorted(
            self.reads, key=lambda name: not name.endswith("_ref")
        ):  # references leave no graph
            side = name.removesuffix("_ref")
            kind = {"reference": True} if name != side else {"grad": True}
            passes[name] = self.engine.forward(
                batches[side], reads=self.reads[name], counts=counts[side], **kind
            )
        return passes

    def _values(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over ranks: each rank's term is its share of the whole batch's mean, times the number of ranks."""
        local = torch.stack(list(terms.values())).detach().double()
        values = (self.engine.total(local) / self.engine.world_size).tolist()
        named = {f"loss/{name}": value for name, value in zip(terms, values, strict=True)}
        return {**named, "loss/total": sum(values)}


def passes_of(plugin: Plugin) -> set[str]:
    """Which passes a loss asks for: its parameter names.

    Raises:
        ConfigError: a parameter that names nothing known.
    """
    names = set(inspect.signature(plugin.loss).parameters) - {"targets", "seed"}  # type: ignore[attr-defined]
    for name in sorted(names):
        if name.removesuffix("_ref") not in SETS:
            allowed = [*SETS, *(f"{known}_ref" for known in SETS), "targets", "seed"]
            raise ConfigError(f"the loss of {plugin.name!r} takes {name!r}: {did_you_mean(name, allowed)}")
    return names


def sets_of(passes: Iterable[str]) -> set[str]:
    """The sets of rows that these passes run over."""
    return {name.removesuffix("_ref") for name in passes}


def reads_of(plugins: Sequence[Plugin], targets: Targets) -> dict[str, Reads]:
    """Each pass that the losses ask for, and what they read of it."""
    asked: dict[str, Reads] = {}
    for plugin in plugins:
        for name in sorted(passes_of(plugin)):
            reads = plugin.reads(targets, name)
            if reads is not None:
                asked[name] = asked[name] | reads if name in asked else reads
    return asked


def _call(plugin: Plugin, known: Mapping[str, object]) -> dict[str, Tensor]:
    wanted = inspect.signature(plugin.loss).parameters  # type: ignore[attr-defined]
    terms: dict[str, Tensor] = plugin.loss(**{name: known.get(name) for name in wanted})  # type: ignore[attr-defined]
    return terms


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant; `step` counts from 1."""
    return training.learning_rate * min(1.0, step / max(training.warmup_steps, 1))


def _broken(terms: Mapping[str, float], norm: float, step: int, origin: str) -> str | None:
    """Why this step was not taken."""
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if not bad and math.isfinite(norm):
        return None
    culprit = ", ".join(bad) or "the gradient norm"
    return f"non-finite {culprit} at step {step}, {origin}; the state before it is kept (lower training.learning_rate?)"


def _floor_reached(metrics: Mapping[str, float], training: TrainingConfig, step: int) -> str | None:
    floor = training.stop_at_forget_accuracy
    if floor is not None and metrics["forget_accuracy"] <= floor:
        return f"forget accuracy {metrics['forget_accuracy']:.3f} reached the floor {floor:g} at step {step}"
    return None
