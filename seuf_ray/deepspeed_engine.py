"""The engine over many processes: DeepSpeed with expert parallelism (AutoEP). The only importer of deepspeed.

Frozen experts are sharded over `expert_parallel_size` ranks; the overlay is replicated like ordinary data-parallel
parameters, so ranks stay symmetric and one target expert in the whole model works with any number of ranks. The
order matters: overlay parameters exist before `deepspeed.initialize` (which replaces the MoE blocks), hooks come after.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.config import ClusterConfig, TrainingConfig
from seuf_ray.engine import LocalEngine
from seuf_ray.model import MoEModel


class DeepSpeedEngine(LocalEngine):
    """LocalEngine's meaning over an initialised process group (gloo or nccl).

    Args:
        model: on this rank's device, whole; DeepSpeed keeps only this rank's experts.
        plan: what trains.
        training: optimiser settings; `batch_size` counts rows over all ranks.
        cluster: expert parallel size and ZeRO stage.
    """

    def __init__(
        self, model: MoEModel, plan: UnlearningPlan, training: TrainingConfig, cluster: ClusterConfig
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.cluster = cluster
        super().__init__(model, plan, training)

    def _prepare(self) -> None:
        import deepspeed

        _avoid_compiling()
        self.model.module.add_module("overlay", self.trainable)
        parameters = self.parameters()
        self.engine, *_ = deepspeed.initialize(
            model=self.model.module,
            optimizer=torch.optim.AdamW(
                self._groups(parameters),
                lr=self.training.learning_rate,
                weight_decay=self.training.weight_decay,
            ),
            config=self._deepspeed_config(),
            dist_init_required=False,
        )
        self.engine.module.eval()
        self.model.attach(self.engine.module)

    def _groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        """ZeRO 1 and 2 insist on a parameter group marked as MoE; ours holds one element that never trains."""
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if self.cluster.expert_parallel_size > 1 and self.cluster.zero_stage > 0:
            name = f"ep_size_{self.cluster.expert_parallel_size}"
            dummy = nn.Parameter(torch.zeros(1, device=self.model.device))
            dummy.allreduce, dummy.group_name = False, name  # type: ignore[attr-defined]
            self.model.module.register_parameter("expert_group", dummy)
            groups.append({"params": [dummy], "moe": True, "name": name})
        return groups

    def _deepspeed_config(self) -> dict[str, Any]:
        parallel = self.cluster.expert_parallel_size
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": max(1, self.training.batch_size // self.world_size),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.training.max_grad_norm if self.cluster.zero_stage else 0.0,
            "zero_optimization": {"stage": self.cluster.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        if parallel > 1:
            family = self.model.family
            config["expert_parallel"] = {
                "enabled": True,
                "autoep_size": parallel,
                "preset_model": family.preset,
            }
        return config

    def step(self, loss: Tensor, learning_rate: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.backward(loss)
        norm = self._clip() if self.cluster.zero_stage == 0 else None
        if norm is None or norm == norm:  # a NaN step would destroy the last good state
            self.engine.step()
        return float(self.engine.get_global_grad_norm()) if norm is None else norm

    def _clip(self) -> float:
        """ZeRO 0 leaves reduced gradients in place, equal on every rank; clip them as LocalEngine does."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters(), self.training.max_grad_norm))

    def total(self, values: Tensor) -> Tensor:
        summed = values.detach().to(self.model.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)


def _avoid_compiling() -> None:
    """DeepSpeed would compile a shared-memory all-reduce on first start; gloo's own is enough and needs no g++."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
