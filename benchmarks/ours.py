"""Our side: one expert of the middle layer and its router, trained through the loop's own `Steps`.

`npo` and `rmu` are no plug-ins of the package yet. NPO is one here, with the forget term only, as its peer. RMU reads
hidden states, which a `Forward` does not carry yet, so its step goes to the engine's prefix and spans directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import peers
import torch
import torch.nn.functional as F
from setting import Setting, control
from torch import Tensor

from seuf_ray import routing
from seuf_ray.artifacts import UnlearningPlan, provenance
from seuf_ray.batches import collate
from seuf_ray.checkpoint import Checkpoint
from seuf_ray.config import ClusterConfig, EngineConfig, JobConfig, TelemetryConfig, TrainingConfig
from seuf_ray.engine import LocalEngine
from seuf_ray.families import PARTS
from seuf_ray.model import MoEModel
from seuf_ray.monitor import Task
from seuf_ray.passes import Batch, Forward, Targets
from seuf_ray.plugins import Plugin
from seuf_ray.spans import ConstantCache
from seuf_ray.unlearning import Steps

Step = Callable[[], object]


class NPO(Plugin):
    """-(2 / beta) mean logsigmoid(-beta (S - S_ref))."""

    name: Literal["npo"] = "npo"
    beta: float = peers.BETA

    def loss(self, forget: Forward, forget_ref: Forward) -> dict[str, Tensor]:
        ratio = forget.sequence_logps() - forget_ref.sequence_logps()
        return {"forget": -2 / self.beta * forget.mean_sequences(F.logsigmoid(-self.beta * ratio))}


class Ours:
    """One expert of the middle layer and its router on an engine, trained by the loop's own steps."""

    def __init__(
        self, setting: Setting, cluster: ClusterConfig | None = None, config: EngineConfig | None = None
    ) -> None:
        checkpoint = Checkpoint(setting.folder)
        self.setting, self.targets = setting, _targets(checkpoint, setting)
        plan, self.config = _plan(checkpoint, setting.target), config or EngineConfig()
        self.training = TrainingConfig(batch_size=setting.rows, learning_rate=peers.LEARNING_RATE)
        if cluster is None:
            model = MoEModel(checkpoint, setting.dtype, setting.device)
            self.engine = LocalEngine(model, plan, self.training, self.config)
        else:
            from seuf_ray.deepspeed_engine import DeepSpeedEngine, owned_experts

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

    def rmu(self) -> Step:
        """RMU with the KL anchor: each pass is the target layer alone, on the cached prefix."""
        forget, retain = (collate(self.setting.data(s), 0).to(self.setting.device) for s in (0, 1))
        forget, retain = forget.named("rmu", "forget"), retain.named("rmu", "retain")
        hidden_size = self.engine.model.module.config.hidden_size
        wanted = control(hidden_size, self.setting)
        layer, engine, kept = self.setting.target[0], self.engine, {}

        def step() -> float:
            forgetting, logits = self._tapped(forget)
            retaining, _ = self._tapped(retain)
            if not kept:
                with torch.no_grad(), engine.trainable.reference():
                    kept["hidden"], kept["logits"] = self._tapped(retain)[0], self._tapped(forget)[1]
            loss = F.mse_loss(forgetting, wanted.expand_as(forgetting))
            loss = loss + peers.RETAIN_WEIGHT * F.mse_loss(retaining, kept["hidden"])
            anchor = routing.kl(kept["logits"], logits, self.targets.scoring).mean()
            engine.backward(loss + anchor)
            return engine.step(peers.LEARNING_RATE)

        assert layer == engine.first_layer
        return step

    def _tapped(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T, D) after the target layer, and its router logits (N, E)."""
        model, layer = self.engine.model, self.setting.target[0]
        prefix = self.engine._prefix(batch)
        hidden = model.spans.run(layer, layer + 1, prefix.hidden, batch.attention)
        return hidden, model.taps.logits[layer]

    def missing(self, step: Step) -> Step:
        """The step as in the first epoch: nothing is in the cache."""

        def take() -> object:
            full, self.engine.cache = self.engine.cache, ConstantCache(2**30)
            found = step()
            self.engine.cache = full
            return found

        return take


def _targets(checkpoint: Checkpoint, setting: Setting) -> Targets:
    shape = checkpoint.shape
    return Targets((setting.target,), (setting.target[0],), shape.moe_layers, shape.scoring)


def _plan(checkpoint: Checkpoint, target: tuple[int, int]) -> UnlearningPlan:
    names = [checkpoint.family.expert_tensor(*target, part) for part in PARTS]
    names.append(checkpoint.family.router_tensor(target[0]))
    numel = sum(math.prod(checkpoint.info(name)[1]) for name in names)
    return UnlearningPlan(
        model=checkpoint.identity("benchmark"),
        provenance=provenance(0),
        scope="explicit",
        top_m=1,
        experts=[target],
        routers=[target[0]],
        tensors=names,
        num_trainable=numel,
        trainable_fraction=numel / checkpoint.num_parameters,
    )
