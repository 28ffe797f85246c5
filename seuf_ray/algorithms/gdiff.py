"""Gradient difference: ascend on the forget set, descend on the retain set.

    L = -CE(forget) + retain_weight * CE(retain),   CE = mean token NLL over counted tokens

Source: open-unlearning `GradDiff`, whose `gamma` is 1 here and whose `alpha` is our `retain_weight`; `retain = kl`
keeps the original's distributions instead (see `retain.py`). With `retain_weight = 0` it is gradient ascent.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.retain import Retaining


class GradientDifference(Retaining):
    name: Literal["gdiff"] = "gdiff"

    def loss(
        self, forget: Forward, retain: Forward | None = None, retain_ref: Forward | None = None
    ) -> dict[str, Tensor]:
        return {"forget": -forget.nll(), **self.retain_term(retain, retain_ref)}
