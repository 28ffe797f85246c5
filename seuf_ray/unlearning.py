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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seuf_ray import evaluation
from seuf_ray.config import JobConfig, TrainingConfig
from seuf_ray.data import Row, Sampler, collate, shard
from seuf_ray.engine import Engine
from seuf_ray.passes import Batch, Forward, Targets
from seuf_ray.plugins import Plugin
from seuf_ray.quiz import Quiz


@dataclass(frozen=True)
class Task:
    """Tokenised data of a run, the same on every rank.

    Attributes:
        forget, retain: training rows.
        quizzes: "forget" and "utility" -> one quiz per question source, for the small evaluations.
        probes: "forget" and "retain" -> rows whose routing is compared with the original's.
        pad_id: any token id; padding is masked everywhere.
    """

    forget: list[Row]
    retain: list[Row]
    quizzes: dict[str, list[Quiz]]
    probes: dict[str, list[Row]]
    pad_id: int


@dataclass(frozen=True)
class Progress:
    """One small evaluation. `stopped` says why the run ended, on the last record only."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None


def run(engine: Engine, config: JobConfig, targets: Targets, task: Task) -> Iterator[Progress]:
    """Train until `training.steps`, the forget-accuracy floor, or a non-finite loss (last good state kept)."""
    monitor = Monitor(engine, task, targets)
    training, seconds, started = config.training, 0.0, time.perf_counter()
    yield Progress(0, monitor.measure())
    steps = Steps(engine, config, targets, task)
    for step in range(1, training.steps + 1):
        started = time.perf_counter()
        terms, norm = steps.take(step)
        seconds += time.perf_counter() - started
        broken = _broken(terms, norm, step)
        due = step % training.evaluate_every == 0 or step == training.steps or broken is not None
        if due:
            metrics = monitor.measure() | terms | {"grad_norm": norm, "seconds": seconds}
            reason = broken or _reason_to_stop(metrics, training, step)
            yield Progress(step, metrics, reason)
            if reason is not None:
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
        self.needed = passes_of(config.algorithm) | passes_of(config.anchor)

    def take(self, step: int) -> tuple[dict[str, float], float]:
        """The terms' values over the whole batch, and the gradient norm before clipping."""
        passes = self._passes(step)
        known = {**passes, "targets": self.targets}
        terms = _call(self.config.algorithm, known) | _call(self.config.anchor, known)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(self.engine.total(loss.detach())):
            return self._values(terms, loss), math.nan
        norm = self.engine.step(loss, learning_rate(self.config.training, step))
        return self._values(terms, loss), norm

    def _passes(self, step: int) -> dict[str, Forward]:
        batches = {name: self._batch(name, step) for name in ("forget", "retain") if self._uses(name)}
        references = sorted(name for name in self.needed if name.endswith("_ref"))
        forwards = {
            name: self.engine.forward(batches[name.removesuffix("_ref")], reference=True)
            for name in references
        }
        for name in sorted(self.needed.difference(references)):
            forwards[name] = self.engine.forward(batches[name], grad=True)
        return forwards

    def _uses(self, name: str) -> bool:
        return bool(self.needed & {name, f"{name}_ref"})

    def _batch(self, name: str, step: int) -> Batch:
        rows: list[Row] = getattr(self.task, name)
        chosen = self.samplers[name].batch(step - 1)
        return padded_share([rows[i] for i in chosen], self.engine, self.task.pad_id)

    def _values(self, terms: Mapping[str, Tensor], loss: Tensor) -> dict[str, float]:
        """Means over ranks: each rank's term is its share of the whole batch's mean, times the number of ranks."""
        local = torch.stack([*terms.values(), loss]).detach().double()
        values = (self.engine.total(local) / self.engine.world_size).tolist()
        return {f"loss/{name}": value for name, value in zip([*terms, "total"], values, strict=True)}


class Monitor:
    """The small evaluation: fixed questions, and routing drift on fixed rows against the original."""

    def __init__(self, engine: Engine, task: Task, targets: Targets) -> None:
        self.engine, self.task, self.targets = engine, task, targets
        self.probes = {name: padded_share(rows, engine, task.pad_id) for name, rows in task.probes.items()}
        self.original = {name: engine.forward(batch, reference=True) for name, batch in self.probes.items()}

    def measure(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, quizzes in self.task.quizzes.items():
            accuracies = [self._accuracy(quiz) for quiz in quizzes]
            key = "forget_accuracy" if name == "forget" else name
            metrics[key] = sum(accuracies) / len(accuracies) if accuracies else math.nan
        for name, batch in self.probes.items():
            metrics |= self._drift(name, batch)
        return metrics

    def _accuracy(self, quiz: Quiz) -> float:
        """Every rank makes the same number of passes, whatever its share: expert parallelism needs them all."""
        engine, correct = self.engine, torch.zeros(2, dtype=torch.float64)
        units = quiz.units(32)
        for first in range(0, len(units), engine.world_size):
            mine = first + engine.rank
            unit = units[mine] if mine < len(units) else units[0]
            logps = engine.forward(collate(unit.rows, self.task.pad_id)).sequence_logps()
            found = evaluation.accuracy(logps.cpu(), unit.answers, unit.num_choices)
            if mine < len(units):
                correct += torch.tensor([found.sum, found.count], dtype=torch.float64)
        hits, count = engine.total(correct).tolist()
        return float(hits / count)

    def _drift(self, name: str, batch: Batch) -> dict[str, float]:
        found = evaluation.drift(self.original[name], self.engine.forward(batch), self.targets.scoring)
        keys = [(figure, layer) for figure, layers in found.items() for layer in layers]
        local = torch.tensor([[found[f][at].sum, found[f][at].count] for f, at in keys], dtype=torch.float64)
        sums = self.engine.total(local).tolist()
        return {f"{figure}/{name}/{layer}": s / n for (figure, layer), (s, n) in zip(keys, sums, strict=True)}


def padded_share(rows: list[Row], engine: Engine, pad_id: int) -> Batch:
    """This rank's rows of a batch; a rank without any runs a filler."""
    mine = shard(range(len(rows)), engine.rank, engine.world_size)
    if mine:
        return collate([rows[i] for i in mine], pad_id)
    return collate(rows[:1], pad_id).filler()


def passes_of(plugin: Plugin) -> set[str]:
    """Which passes a loss asks for: its parameter names."""
    return {name for name in inspect.signature(plugin.loss).parameters if name != "targets"}  # type: ignore[attr-defined]


def _call(plugin: Plugin, known: Mapping[str, object]) -> dict[str, Tensor]:
    wanted = inspect.signature(plugin.loss).parameters  # type: ignore[attr-defined]
    terms: dict[str, Tensor] = plugin.loss(**{name: known[name] for name in wanted})  # type: ignore[attr-defined]
    return terms


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant; `step` counts from 1."""
    return training.learning_rate * min(1.0, step / max(training.warmup_steps, 1))


def _broken(terms: Mapping[str, float], norm: float, step: int) -> str | None:
    """Why this step was not taken."""
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if not bad and math.isfinite(norm):
        return None
    culprit = ", ".join(bad) or "the gradient norm"
    return f"non-finite {culprit} at step {step}; the state before it is kept (lower training.learning_rate?)"


def _reason_to_stop(metrics: Mapping[str, float], training: TrainingConfig, step: int) -> str | None:
    floor = training.stop_at_forget_accuracy
    if floor is not None and metrics["forget_accuracy"] <= floor:
        return f"forget accuracy {metrics['forget_accuracy']:.3f} reached the floor {floor:g} at step {step}"
    return None
