"""The engine over a process group without a wrapper of its own: what trains is replicated, its gradients are averaged.

DeepSpeed's engine is made for one training: it takes the model, and a second one over the same model would want to
replace its MoE blocks again. Here DeepSpeed shards the frozen experts once (`shard_experts`), and each trial adds an
overlay, an optimizer, and this. It computes what DeepSpeedEngine computes with ZeRO stage 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.config import EngineConfig, TrainingConfig
from seuf_ray.engine.local import LocalEngine
from seuf_ray.engine.ranks import sum_over_ranks
from seuf_ray.model.moe import MoEModel
from seuf_ray.model.spans import ConstantCache


class ReplicatedEngine(LocalEngine):
    """LocalEngine's meaning over an initialised process group (gloo or nccl).

    Args:
        model: the same on every rank, but that experts may be sharded.
        plan: what trains, on every rank.
        training: optimiser settings; `batch_size` counts rows over all ranks.
        cache: as LocalEngine's; agreed on by `mean_over_ranks`.
    """

    def __init__(
        self,
        model: MoEModel,
        plan: UnlearningPlan,
        training: TrainingConfig,
        config: EngineConfig | None = None,
        cache: ConstantCache | None = None,
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        super().__init__(model, plan, training, config, cache=cache)

    def step(self, learning_rate: float) -> float:
        self._average_gradients()
        return super().step(learning_rate)

    @torch.no_grad()
    def _average_gradients(self) -> None:
        """One all-reduce for all of them; what no token of a rank touched has none there."""
        parameters = self.parameters()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def total(self, values: Tensor) -> Tensor:
        return sum_over_ranks(values, self.model.device)
