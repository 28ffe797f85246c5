"""Weighted gradient ascent: tokens that are unlikely already no longer pull.

    L = mean over counted tokens of p^beta * log p + retain term,   p^beta a weight without gradient

With beta = 0 it is gradient ascent.
Source: weighted gradient ascent (arXiv 2502.19301); open-unlearning `WGA` (same formula; theirs averages per-device
means, ours the whole batch, so that the gradient does not depend on how rows fall on devices).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.retain import Retaining


class WeightedGradientAscent(Retaining):
    name: Literal["wga"] = "wga"
    beta: float = Field(1.0, ge=0, description="how much less unlikely tokens weigh; 0 is gradient ascent")

    def loss(
        self, forget: Forward, retain: Forward | None = None, retain_ref: Forward | None = None
    ) -> dict[str, Tensor]:
        weight = (self.beta * forget.logps.detach()).exp()  # (B, T-1)
        value = forget.mean_tokens(weight * forget.logps)
        return {"forget": value, **self.retain_term(retain, retain_ref)}
