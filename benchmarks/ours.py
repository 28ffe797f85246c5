"""Our side: one expert of the middle layer (or of each) and its router, trained through the loop's own `Steps`.

The batch goes through in micro-batches of a quarter, which is what keeps the peak of memory low (`FRUGAL`): one
setting for time and memory alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from setting import STEERING, Setting

from seuf_ray.artifacts import Expert, UnlearningPlan, provenance
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import ClusterConfig, EngineConfig, JobConfig, TelemetryConfig, TrainingConfig
from seuf_ray.engine import LocalEngine
from seuf_ray.families import PARTS
from seuf_ray.model.moe import MoEModel
from seuf_ray.model.spans import ConstantCache
from seuf_ray.monitor import Task
from seuf_ray.passes import Targets
from seuf_ray.unlearning import Steps

Step = Callable[[], object]
NPO = {"name": "npo", "beta": peers.BETA, "retain_weight": 0.0}  # the forget term only, as the peer's
RMU = {"name": "rmu", "steering_coefficient": STEERING, "retain_weight": peers.RETAIN_WEIGHT}


def frugal(setting: Setting) -> EngineConfig:
    """A quarter of the batch at a time."""
    return EngineConfig(micro_batch_size=max(1, setting.rows // 4))


class Ours:
    """Target experts and their routers on an engine, trained by the loop's own steps.

    Args:
        every_layer: one expert of each layer; default: one of the middle layer.
    """

    def __init__(
        self,
        setting: Setting,
        cluster: ClusterConfig | None = None,
        config: EngineConfig | None = None,
        *,
        every_layer: bool = False,
    ) -> None:
        checkpoint = Checkpoint(setting.folder)
        layers = checkpoint.shape.moe_layers if every_layer else setting.target[:1]
        experts = [(layer, setting.target[1]) for layer in layers]
        shape = checkpoint.shape
        self.setting = setting
        self.targets = Targets(tuple(experts), tuple(layers), shape.moe_layers, shape.scoring)
        plan, self.config = _plan(checkpoint, experts), config or frugal(setting)
        self.training = TrainingConfig(batch_size=setting.rows, learning_rate=peers.LEARNING_RATE)
        if cluster is None:
            model = MoEModel(checkpoint, setting.dtype, setting.device)
            self.engine = LocalEngine(model, plan, self.training, self.config)
        else:
            from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine, owned_experts

            rank, size = torch.distributed.get_rank(), cluster.expert_parallel_size
            owned = owned_experts(checkpoint.shape.num_experts, rank, size)
            model = MoEModel(checkpoint, setting.dtype, setting.device, owned=owned)
            self.engine = DeepSpeedEngine(model, plan, self.training, cluster, self.config)

    def step(
        self, algorithm: Any = "ga", anchor: str = "kl", telemetry: TelemetryConfig | None = None
    ) -> Step:
        """A function that takes the next step; the forget set is one batch, which therefore comes again."""
        config = JobConfig(
            output_dir=Path("unused"),
            algorithm=algorithm,
            anchor=anchor,
            training=self.training,
            engine=self.config,
            telemetry=telemetry or TelemetryConfig(),
        )
        task = Task(self.setting.data(0), self.setting.data(1), {}, {}, 0)
        steps, numbers = Steps(self.engine, config, self.targets, task), iter(range(1, 10**6))
        return lambda: steps.take(next(numbers))

    def missing(self, step: Step) -> Step:
        """The step as in the first epoch: nothing is in the cache."""

        def take() -> object:
            full, self.engine.cache = self.engine.cache, ConstantCache(2**30)
            found = step()
            self.engine.cache = full
            return found

        return take


def _plan(checkpoint: Checkpoint, experts: list[Expert]) -> UnlearningPlan:
    layers = [layer for layer, _ in experts]
    names = [checkpoint.family.expert_tensor(*expert, part) for expert in experts for part in PARTS]
    names += [checkpoint.family.router_tensor(layer) for layer in layers]
    numel = sum(math.prod(checkpoint.info(name)[1]) for name in names)
    return UnlearningPlan(
        model=checkpoint.identity("benchmark"),
        provenance=provenance(0),
        scope="explicit",
        top_m=1,
        experts=experts,
        routers=layers,
        tensors=names,
        num_trainable=numel,
        trainable_fraction=numel / checkpoint.num_parameters,
    )
