"""One-hot anchor: forget tokens are routed to the target experts.

    L = weight * mean over layers and real tokens of ||g - a||^2,   a_i = 1 for target experts, else 0

`g` is the gate value of each expert (0 outside the top-k) as the paper's Eq. 3 has it, with `values = scores` the
score of every expert before the choice, as the authors' code has it. `reduction = mean` divides by the number of
experts, which the code does and Eq. 3 does not.
Source: SEUF, Eq. 3 (arXiv 2411.18797).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from seuf_ray import routing
from seuf_ray.passes import Forward, Targets
from seuf_ray.plugins import Plugin, Reads


class OneHotAnchor(Plugin):
    name: Literal["onehot"] = "onehot"
    weight: float = Field(1.0, ge=0, description="weight of the anchor (alpha in the paper)")
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="over experts: sum is Eq. 3, mean the authors' code"
    )
    values: Literal["gates", "scores"] = Field(
        "gates", description="gates is Eq. 3, scores the authors' code"
    )

    def reads(self, targets: Targets, name: str) -> Reads:
        return Reads(depth=max(targets.routers) + 1)

    def loss(self, targets: Targets, forget: Forward) -> dict[str, Tensor]:
        distances = [forget.mean_routed(self._distance(targets, forget, layer)) for layer in targets.routers]
        return {"anchor": self.weight * torch.stack(distances).mean()}

    def _distance(self, targets: Targets, forget: Forward, layer: int) -> Tensor:
        """(N,) squared distance of each token's routing from the target experts."""
        score = routing.scores(forget.router_logits[layer], targets.scoring)  # (N, E)
        value = routing.gates(score, forget.router_choices[layer]) if self.values == "gates" else score
        wanted = torch.zeros_like(value)
        wanted[:, targets.experts_of(layer)] = 1.0
        squares = (value - wanted).square()
        return squares.sum(dim=1) if self.reduction == "sum" else squares.mean(dim=1)
