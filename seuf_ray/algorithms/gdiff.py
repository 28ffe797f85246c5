"""Gradient difference: ascend on the forget set, descend on the retain set.

    L = -CE(forget) + retain_weight * CE(retain),   CE = mean token NLL over counted tokens

Source: open-unlearning `GradDiff`, whose `gamma` is 1 here and whose `alpha` is our `retain_weight`.
With `retain_weight = 0` it is gradient ascent.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.plugins import Plugin


class GradientDifference(Plugin):
    name: Literal["gdiff"] = "gdiff"
    retain_weight: float = Field(1.0, ge=0, description="weight of the retain term (open-unlearning: alpha)")

    def loss(self, forget: Forward, retain: Forward) -> dict[str, Tensor]:
        return {"forget": -forget.nll(), "retain": self.retain_weight * retain.nll()}
