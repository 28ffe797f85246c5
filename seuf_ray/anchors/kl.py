"""KL anchor: forget tokens keep the routing distribution that the original model gave them.

    L = weight * mean over layers and real tokens of KL(p_original || p_current)

`p` is softmax(z), or sigmoid(z) / sum for sigmoid routers. `layers = targets` anchors the layers whose router
trains; `all` every MoE layer from the first target on (layers below cannot drift).
Source: the anchor of SEUF (arXiv 2411.18797, Eq. 3), with the original's distribution in place of a one-hot one; the
paper's own is `onehot`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from seuf_ray import routing
from seuf_ray.passes import Forward, Targets
from seuf_ray.plugins import Plugin, Reads


class KLAnchor(Plugin):
    name: Literal["kl"] = "kl"
    weight: float = Field(1.0, ge=0, description="weight of the anchor (alpha in the paper)")
    layers: Literal["targets", "all"] = Field("targets", description="which routers are anchored")

    def reads(self, targets: Targets, name: str) -> Reads:
        return Reads(depth=max(self._layers(targets)) + 1)

    def loss(self, targets: Targets, forget: Forward, forget_ref: Forward) -> dict[str, Tensor]:
        drifts = [
            forget.mean_routed(
                routing.kl(forget_ref.router_logits[layer], forget.router_logits[layer], targets.scoring)
            )
            for layer in self._layers(targets)
        ]
        return {"anchor": self.weight * torch.stack(drifts).mean()}

    def _layers(self, targets: Targets) -> tuple[int, ...]:
        return targets.routers if self.layers == "targets" else targets.layers_from_first
