"""Gradient ascent: push the forget set's likelihood down.

    L = -CE(forget),   CE = mean token NLL over counted tokens

Source: open-unlearning `GradAscent` (same formula; theirs averages per-device means, ours the whole batch, so that the
gradient does not depend on how rows fall on devices).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.plugins import Plugin


class GradientAscent(Plugin):
    name: Literal["ga"] = "ga"

    def loss(self, forget: Forward) -> dict[str, Tensor]:
        return {"forget": -forget.nll()}
