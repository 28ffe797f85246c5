"""Frozen router: the target layers' routers do not train, and there is no loss.

A control: freezing cannot stop the indirect drift of routers further down.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from seuf_ray.plugins import Plugin


class FrozenRouter(Plugin):
    name: Literal["frozen"] = "frozen"

    def loss(self) -> dict[str, Tensor]:
        return {}
