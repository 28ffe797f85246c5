"""The engine over many processes: DeepSpeed with expert parallelism (AutoEP). The only importer of deepspeed.

Frozen experts are sharded over `expert_parallel_size` ranks; the overlay is replicated like ordinary data-parallel
parameters, so ranks stay symmetric and one target expert in the whole model works with any number of ranks. The
order matters: overlay parameters exist before `deepspeed.initialize` (which replaces the MoE blocks), hooks come after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.config import ClusterConfig, EngineConfig, TrainingConfig
from seuf_ray.engine.local import LocalEngine, clone
from seuf_ray.engine.protocol import State
from seuf_ray.engine.ranks import sum_over_ranks
from seuf_ray.model.moe import MoEModel


class DeepSpeedEngine(LocalEngine):
    """LocalEngine's meaning over an initialised process group (gloo or nccl).

    Args:
        model: on this rank's device, whole; DeepSpeed keeps only this rank's experts.
        plan: what trains.
        training: optimiser settings; `batch_size` counts rows over all ranks.
        cluster: expert parallel size and ZeRO stage.
    """

    optimizer: Any  # DeepSpeed's wrapper under ZeRO, AdamW itself without

    def __init__(
        self,
        model: MoEModel,
        plan: UnlearningPlan,
        training: TrainingConfig,
        cluster: ClusterConfig,
        config: EngineConfig | None = None,
        spill: Path | None = None,
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.cluster = cluster
        super().__init__(model, plan, training, config, spill)

    def _prepare(self) -> None:
        self.model.module.add_module("overlay", self.trainable)
        groups = self._groups(self.parameters())
        self.engine = _initialize(
            self.model,
            self._deepspeed_config(),
            # Given a ready optimizer, DeepSpeed would keep every source expert until it has mapped them.
            optimizer=lambda _: torch.optim.AdamW(
                groups, lr=self.training.learning_rate, weight_decay=self.training.weight_decay
            ),
        )
        self.optimizer = self.engine.optimizer

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
        return _expert_parallel(self.model, self.cluster.expert_parallel_size) | {
            "train_micro_batch_size_per_gpu": max(1, self.training.batch_size // self.world_size),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.training.max_grad_norm if self.cluster.zero_stage else 0.0,
            "zero_optimization": {"stage": self.cluster.zero_stage},
            "zero_allow_untested_optimizer": True,
        }

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip() if self.cluster.zero_stage == 0 else None
        if norm is not None and not math.isfinite(norm):  # such a step would destroy the last good state
            self.engine.zero_grad()
            return norm
        self.engine.step()
        self._project()
        return float(self.engine.get_global_grad_norm()) if norm is None else norm

    @property
    def has_sharded_state(self) -> bool:
        """Whether each rank must save its own part of the optimizer."""
        return self.cluster.zero_stage > 0

    def tensors(self) -> dict[str, Tensor]:
        """Every rank must call this: ZeRO 3 keeps each parameter in parts."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(self.parameters(), enabled=self.cluster.zero_stage == 3):
            return super().tensors()

    def state(self) -> State:
        """Under ZeRO: this rank's flat partitions of the float32 masters and of the optimizer's moments."""
        if not self.has_sharded_state:
            return super().state()
        moments = (
            self.optimizer.optimizer.state
        )  # by master; ZeRO 3's optimizer cannot make its own state_dict
        parts = [{"master": part, "moments": dict(moments.get(part, {}))} for part in self._masters()]
        return {"partitions": clone(parts)}

    def load_state(self, state: State) -> None:
        if not self.has_sharded_state:
            super().load_state(state)
            return
        for part, saved in zip(self._masters(), state["partitions"], strict=True):
            part.data.copy_(saved["master"])
            mine = self.optimizer.optimizer.state[part]
            for name, value in saved["moments"].items():
                mine[name] = clone(value).to(mine[name].device if name in mine else part.device)
        self._publish_masters()

    def _masters(self) -> list[Tensor]:
        parts: list[Tensor] = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.cluster.zero_stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )
        return parts

    def _publish_masters(self) -> None:
        """Give every rank's model the values that the masters hold, as an optimizer step would."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        full = [safe_get_full_fp32_param(parameter) for parameter in self.parameters()]
        gathered = deepspeed.zero.GatheredParameters(
            self.parameters(), modifier_rank=0, enabled=self.cluster.zero_stage == 3
        )
        with gathered, torch.no_grad():
            for parameter, value in zip(self.parameters(), full, strict=True):
                parameter.copy_(value)

    def _clip(self) -> float:
        """ZeRO 0 leaves reduced gradients in place, equal on every rank; clip them as LocalEngine does."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters(), self.training.max_grad_norm))

    def total(self, values: Tensor) -> Tensor:
        return sum_over_ranks(values, self.model.device)


def owned_experts(num_experts: int, rank: int, expert_parallel_size: int) -> range | None:
    """The experts of each layer that this rank keeps; None: all. Expert groups are made of consecutive ranks."""
    if expert_parallel_size == 1:
        return None
    size = num_experts // expert_parallel_size
    first = (rank % expert_parallel_size) * size
    return range(first, first + size)


def shard_experts(model: MoEModel, expert_parallel_size: int) -> None:
    """Leave this rank its own experts of a frozen `model`, and let its passes exchange tokens with other ranks.

    From here on a pass is collective: every rank runs one at the same time, though of another batch.
    """
    if expert_parallel_size > 1:
        _initialize(
            model, {"train_micro_batch_size_per_gpu": 1} | _expert_parallel(model, expert_parallel_size)
        )


def _expert_parallel(model: MoEModel, size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of `size` ranks that share one copy of the experts."""
    if size == 1:
        return {}
    return {"expert_parallel": {"enabled": True, "autoep_size": size, "preset_model": model.family.preset}}


def _initialize(model: MoEModel, config: dict[str, Any], optimizer: Callable[..., Any] | None = None) -> Any:
    """DeepSpeed's engine around `model`, which then sees the blocks that AutoEP has put in place of its own."""
    import deepspeed

    _avoid_compiling()
    model.detach()  # taps hold the blocks that DeepSpeed replaces, and with them all experts
    engine, *_ = deepspeed.initialize(
        model=model.module,
        optimizer=optimizer,
        config={"steps_per_print": 2**31} | config,
        dist_init_required=False,
    )
    engine.module.eval()
    model.attach(engine.module)
    return engine


def _avoid_compiling() -> None:
    """DeepSpeed would compile a shared-memory all-reduce on first start; gloo's own is enough and needs no g++."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
