"""The engine in one process: the specification for every other engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.config import EngineConfig, TrainingConfig
from seuf_ray.diagnosis import GradientWatch
from seuf_ray.engine.protocol import State
from seuf_ray.model.inplace import InPlace
from seuf_ray.model.lora import LowRank
from seuf_ray.model.moe import ALL, MoEModel, Prefix, batch_counts
from seuf_ray.model.overlay import Overlay
from seuf_ray.model.spans import ConstantCache
from seuf_ray.passes import Batch, Counts, Forward, by_layer, flat_routing, restored
from seuf_ray.plugins import Reads
from seuf_ray.projection import Projection


class LocalEngine:
    """The protocol in one process.

    Args:
        model: frozen; the trainable part is added here.
        plan: what trains.
        training: optimiser settings.
        config: memory settings.
        spill: folder for cached tensors that do not fit in memory.
        cache: of engines before this one over the same model, to be used on.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        model: MoEModel,
        plan: UnlearningPlan,
        training: TrainingConfig,
        config: EngineConfig | None = None,
        spill: Path | None = None,
        cache: ConstantCache | None = None,
    ) -> None:
        self.model, self.training, self.config = model, training, config or EngineConfig()
        self.first_layer = plan.first_layer
        self.trainable = trainable_part(model, plan)
        self._prepare()
        self.trainable.attach(self.model)
        self.watch = GradientWatch(self._named())
        self.projections: list[Projection] = []
        self.cache = cache or ConstantCache(self.config.prefix_cache_bytes, spill, self._agree)

    def _prepare(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.training.learning_rate, weight_decay=self.training.weight_decay
        )

    def _agree(self, size: int) -> int:
        """The mean of all ranks' sizes: the same on each, so that they decide alike."""
        return int(self.total(torch.tensor(float(size), dtype=torch.float64)) / self.world_size)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser sees: the plan's tensors and nothing else."""
        return self.trainable.trained()

    def _named(self) -> dict[str, nn.Parameter]:
        """The same under names for people."""
        known = [*self.trainable.named_parameters(), *self.model.module.named_parameters()]
        names = {id(parameter): name for name, parameter in reversed(known)}
        return {names[id(parameter)]: parameter for parameter in self.parameters()}

    def forward(
        self,
        batch: Batch,
        *,
        reference: bool = False,
        grad: bool = False,
        reads: Reads = ALL,
        counts: Counts | None = None,
    ) -> Forward:
        batch = batch.to(self.model.device)
        counts = counts or self.counts([batch])
        if reference:
            return self._reference(batch, reads, counts)
        with torch.set_grad_enabled(grad):
            checkpointing = grad and self.config.gradient_checkpointing
            prefix = self._prefix(batch)
            return self.model.forward(batch, counts, reads=reads, prefix=prefix, checkpointing=checkpointing)

    def counts(self, parts: list[Batch]) -> Counts:
        """Counts of a batch that these parts, on all ranks, make up; divided by the number of ranks."""
        local = torch.tensor([batch_counts(part) for part in parts], dtype=torch.float64).sum(dim=0)
        tokens, sequences, routed = (self.total(local) / self.world_size).tolist()
        return tokens, sequences, routed

    def _prefix(self, batch: Batch) -> Prefix | None:
        """Nothing below the lowest target ever changes, so a batch that comes again goes on from there."""
        if self.first_layer == 0:
            return None  # embeddings may train
        key = (batch.key, "prefix", self.first_layer)
        kept = self.cache.get(key, self.model.device) if batch.key is not None else None
        if kept is not None:
            assert kept["hidden"].shape[:2] == batch.ids.shape, f"two batches are called {batch.key}"
            return Prefix(
                self.first_layer, kept["hidden"], by_layer(kept, "logits"), by_layer(kept, "choices")
            )
        prefix = self.model.prefix(batch, self.first_layer)
        if batch.key is not None:
            self.cache.put(
                key, {"hidden": prefix.hidden} | flat_routing(prefix.router_logits, prefix.router_choices)
            )
        return prefix

    @torch.no_grad()
    def _reference(self, batch: Batch, reads: Reads, counts: Counts) -> Forward:
        """The original model's pass: the same every time, so kept for a batch that comes again."""
        key = (batch.key, "reference", reads)
        is_kept = (
            batch.key is not None and not reads.logits
        )  # logits are the size of hundreds of hidden states
        if is_kept and (kept := self.cache.get(key, self.model.device)) is not None:
            return restored(kept, batch, counts)
        with self.trainable.reference():
            forward = self.model.forward(batch, counts, reads=reads, prefix=self._prefix(batch))
        if is_kept:
            routing = flat_routing(forward.router_logits, forward.router_choices)
            hidden = {f"hidden/{at}": tensor for at, tensor in forward.hidden.items()}
            self.cache.put(key, {"logps": forward.logps} | routing | hidden)
        return forward

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.training.max_grad_norm)
        if math.isfinite(norm):
            self.optimizer.step()
            self._project()
        self.optimizer.zero_grad()
        return float(norm)

    def broken_gradients(self) -> list[str]:
        return self.watch.found(self.total)

    def constrain(self, bases: Mapping[int, Tensor]) -> None:
        weights, original = self.trainable.router_weights(), self.model.checkpoint
        self.projections = [
            Projection(
                weights[layer],
                original.read(self.model.family.router_tensor(layer)).to(self.model.dtype).to(weights[layer]),
                basis.to(weights[layer].device),
            )
            for layer, basis in bases.items()
        ]

    def _project(self) -> None:
        for projection in self.projections:
            projection.apply()

    def router_gradient(self, loss: Tensor) -> Tensor:
        weights = list(self.trainable.router_weights().values())
        if not weights or not loss.requires_grad:
            return loss.new_zeros(0)
        found = torch.autograd.grad(
            loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([gradient.flatten() for gradient in found])

    def tensors(self) -> dict[str, Tensor]:
        return self.trainable.tensors()

    def total(self, values: Tensor) -> Tensor:
        return values

    def state(self) -> State:
        parameters = [parameter.detach().cpu().clone() for parameter in self.parameters()]
        return {"parameters": parameters, "optimizer": clone(self.optimizer.state_dict())}

    def load_state(self, state: State) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(clone(state["optimizer"]))
        self.optimizer.zero_grad()  # of a step that was given up half way

    def detach(self) -> None:
        self.watch.remove()  # parameters of the model itself outlive this engine
        self.trainable.detach()


def trainable_part(model: MoEModel, plan: UnlearningPlan) -> Overlay | InPlace | LowRank:
    """What of the plan trains, in or beside the model."""
    if plan.lora is not None:
        return LowRank(model, plan.tensors, plan.lora.rank, plan.lora.alpha, plan.provenance.seed)
    return InPlace(model, plan.tensors) if plan.is_in_place else Overlay(model, plan)


def clone(value: Any) -> Any:
    """A copy of nested dicts and lists with their tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return [clone(item) for item in value] if isinstance(value, list) else value
