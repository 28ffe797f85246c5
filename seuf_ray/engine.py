"""The engine protocol, and LocalEngine: its one-process meaning, the specification for every other engine.

Passes go up, tensors go down: the loop asks for `Forward`s of batches (of the trained model or of the original) and
hands back one scalar to minimise. What trains is known by checkpoint names. Nothing else crosses.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.config import TrainingConfig
from seuf_ray.model import MoEModel, batch_counts
from seuf_ray.overlay import FullParameters, Overlay
from seuf_ray.passes import Batch, Forward


class Engine(Protocol):
    """What the unlearning loop needs."""

    rank: int
    world_size: int

    def forward(self, batch: Batch, *, reference: bool = False, grad: bool = False) -> Forward:
        """One pass of this rank's share of a batch; `reference` runs the original model (never with gradients)."""

    def step(self, loss: Tensor, learning_rate: float) -> float:
        """Backward, clip, optimiser step; returns the gradient norm over the whole plan before clipping."""

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors under checkpoint names."""

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum of `values` over all ranks."""


class LocalEngine:
    """The protocol in one process.

    Args:
        model: frozen; the trainable part is added here.
        plan: what trains.
        training: optimiser settings.
    """

    rank = 0
    world_size = 1

    def __init__(self, model: MoEModel, plan: UnlearningPlan, training: TrainingConfig) -> None:
        self.model = model
        self.training = training
        self.trainable = trainable_part(model, plan)
        self._prepare()
        self.trainable.attach(self.model)

    def _prepare(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.training.learning_rate, weight_decay=self.training.weight_decay
        )

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimiser sees: the plan's tensors and nothing else."""
        if isinstance(self.trainable, FullParameters):
            return list(self.model.module.parameters())
        return list(self.trainable.parameters())

    def forward(self, batch: Batch, *, reference: bool = False, grad: bool = False) -> Forward:
        batch = batch.to(self.model.device)
        with torch.set_grad_enabled(grad), self.trainable.reference() if reference else nullcontext():
            return self.model.forward(batch, self._counts(batch))

    def _counts(self, batch: Batch) -> tuple[float, float, float]:
        local = torch.tensor(batch_counts(batch), dtype=torch.float64, device=self.model.device)
        tokens, sequences, routed = (self.total(local) / self.world_size).tolist()
        return tokens, sequences, routed

    def step(self, loss: Tensor, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.training.max_grad_norm)
        if torch.isfinite(norm):  # else the caller stops, with the last good state kept
            self.optimizer.step()
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        return self.trainable.tensors()

    def total(self, values: Tensor) -> Tensor:
        return values


def trainable_part(model: MoEModel, plan: UnlearningPlan) -> Overlay | FullParameters:
    """The plan's parameters, copied from the model."""
    return FullParameters(model) if plan.is_full else Overlay(model, plan)
