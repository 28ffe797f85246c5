"""The small evaluation on the way: fixed questions, and routing drift on fixed rows against the original."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from seuf_ray import evaluation
from seuf_ray.data.batches import collate, share
from seuf_ray.data.rows import Row
from seuf_ray.engine import Engine
from seuf_ray.passes import Batch, Targets
from seuf_ray.quiz import Quiz


@dataclass(frozen=True)
class Task:
    """Tokenised data of a run, the same on every rank.

    Attributes:
        forget, retain: training rows.
        quizzes: "forget" and "utility" -> one quiz per question source, for the small evaluations.
        probes: "forget" and "retain" -> rows whose routing is compared with the original's.
        pad_id: any token id; padding is masked everywhere.
        idk: for each forget row the one that an algorithm prefers, if it asks for them.
    """

    forget: list[Row]
    retain: list[Row]
    quizzes: dict[str, list[Quiz]]
    probes: dict[str, list[Row]]
    pad_id: int
    idk: list[Row] = field(default_factory=list)


class Monitor:
    """The small evaluation: fixed questions, and routing drift on fixed rows against the original."""

    def __init__(self, engine: Engine, task: Task, targets: Targets) -> None:
        self.engine, self.task, self.targets = engine, task, targets
        self.probes = {
            name: share(rows, engine.rank, engine.world_size, task.pad_id).named("probe", name)
            for name, rows in task.probes.items()
        }
        self.original = {name: engine.forward(batch, reference=True) for name, batch in self.probes.items()}

    def measure(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, quizzes in self.task.quizzes.items():
            accuracies = [self._accuracy(quiz, name, at) for at, quiz in enumerate(quizzes)]
            key = "forget_accuracy" if name == "forget" else name
            metrics[key] = sum(accuracies) / len(accuracies) if accuracies else math.nan
        for name, batch in self.probes.items():
            metrics |= self._drift(name, batch)
        return metrics

    def _accuracy(self, quiz: Quiz, *key: Hashable) -> float:
        """Every rank makes the same number of passes, whatever its share: expert parallelism needs them all."""
        engine, correct = self.engine, torch.zeros(2, dtype=torch.float64)
        units = quiz.units(32)
        for first in range(0, len(units), engine.world_size):
            mine = first + engine.rank
            number = mine if mine < len(units) else 0
            unit = units[number]
            batch = collate(unit.rows, self.task.pad_id).named("quiz", *key, number)
            logps = engine.forward(batch).sequence_logps()
            found = evaluation.accuracy(logps.cpu(), unit.answers, unit.num_choices)
            if mine < len(units):
                correct += torch.tensor([found.sum, found.count], dtype=torch.float64)
        hits, count = engine.total(correct).tolist()
        return float(hits / count)

    def _drift(self, name: str, batch: Batch) -> dict[str, float]:
        current = self.engine.forward(batch)
        nll = float(self.engine.total(current.nll().detach().double()[None]) / self.engine.world_size)
        found = evaluation.drift(self.original[name], current, self.targets.scoring)
        keys = [(figure, layer) for figure, layers in found.items() for layer in layers]
        local = torch.tensor([[found[f][at].sum, found[f][at].count] for f, at in keys], dtype=torch.float64)
        sums = self.engine.total(local).tolist()
        drift = {f"{figure}/{name}/{at}": s / n for (figure, at), (s, n) in zip(keys, sums, strict=True)}
        return {f"nll/{name}": nll} | drift
