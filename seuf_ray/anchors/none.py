"""No anchor: routers train freely. The ablation that shows why the anchor is there."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from seuf_ray.plugins import Plugin


class NoAnchor(Plugin):
    name: Literal["none"] = "none"

    def loss(self) -> dict[str, Tensor]:
        return {}
