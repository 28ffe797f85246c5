"""Representation misdirection: push what a layer makes of forget tokens towards one fixed vector.

    L = mean over tokens of ||h(forget) - c * u||^2  +  retain_weight * mean of ||h(retain) - h_ref(retain)||^2
    h = output of decoder layer `layer` (D,),   u = a unit vector of uniform entries, drawn from the run's seed

Nothing above the layer runs, and no head. Both means are over the real tokens of the whole batch.
Source: RMU (arXiv 2403.03218), whose code takes the mean over D where we take the sum, as the formula has it: the two
terms weigh the same against each other, D times as much against an anchor. That code averages padding too, and trains
three layers' `down_proj`; here the plan says what trains. open-unlearning leaves out padding, and prompts, which the
formula has; but it divides (B,) by (B, 1), which mixes the lengths of rows. SEUF's authors ran c = 8000 (Qwen) and
32000 (DeepSeek) with retain weight 1200, the RMU code 20 and 100: c is some multiple of the model's ||h||.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from seuf_ray.errors import ConfigError
from seuf_ray.passes import Forward, Targets
from seuf_ray.plugins import Plugin, Reads


class RepresentationMisdirection(Plugin):
    name: Literal["rmu"] = "rmu"
    steering_coefficient: float = Field(20.0, gt=0, description="c, the length of the control vector")
    retain_weight: float = Field(100.0, ge=0, description="weight of the retain term; 0: none (alpha)")
    layer: int | None = Field(
        None, description="whose output is steered; default: the last target layer, else the middle MoE layer"
    )

    def reads(self, targets: Targets, name: str) -> Reads | None:
        layer, is_needed = self._layer(targets), self.retain_weight > 0 or not name.startswith("retain")
        return Reads(depth=layer + 1, hidden=frozenset({layer})) if is_needed else None

    def loss(
        self,
        targets: Targets,
        seed: int,
        forget: Forward,
        retain: Forward | None = None,
        retain_ref: Forward | None = None,
    ) -> dict[str, Tensor]:
        layer = self._layer(targets)
        hidden = forget.hidden[layer].float()  # (B, T, D)
        uniform = torch.rand(hidden.shape[-1], generator=torch.Generator().manual_seed(seed)).to(hidden)
        control = self.steering_coefficient * uniform / uniform.norm()
        terms = {"forget": forget.mean_hidden((hidden - control).square().sum(dim=-1))}
        if retain is not None and retain_ref is not None and self.retain_weight > 0:
            change = retain.hidden[layer].float() - retain_ref.hidden[layer].float()
            terms["retain"] = self.retain_weight * retain.mean_hidden(change.square().sum(dim=-1))
        return terms

    def _layer(self, targets: Targets) -> int:
        if self.layer is None:
            middle = targets.moe_layers[len(targets.moe_layers) // 2]
            return targets.routers[-1] if targets.experts else middle
        first, last = targets.routers[0], targets.moe_layers[-1]
        if not first <= self.layer <= last:
            raise ConfigError(
                f"algorithm.layer = {self.layer}: allowed are {first} to {last}, from the first target layer "
                "(nothing that trains changes the output of a lower one) to the last with experts"
            )
        return self.layer
