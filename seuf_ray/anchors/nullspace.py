"""Null-space anchor: routers change only where retain tokens do not reach; there is no loss.

    M = sum of x x^T over the router's inputs x at retain tokens,   U = M's leading eigenvectors, holding `energy` of it
    W <- W_0 + (W - W_0) (I - U U^T)   after every step

So retain tokens keep their router logits up to the `1 - energy` that is left out, exactly with `energy = 1`.
`anchor/rank/LAYER` says how many directions are protected: with all D of them the router is frozen.
Costs 8 D^2 bytes for each trained router.
Source: after GRIP (arXiv 2601.16905), which projects gradients, for each expert by itself; ours projects the change,
which AdamW and weight decay cannot undo (see `projection.py`), for all experts of a router together.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from seuf_ray.plugins import Plugin


class NullSpaceAnchor(Plugin):
    name: Literal["nullspace"] = "nullspace"
    energy: float = Field(
        0.95, gt=0, le=1, description="share of the retain inputs' second moment that is protected"
    )
    num_rows: int = Field(1024, ge=1, description="retain rows whose router inputs are looked at")

    def loss(self) -> dict[str, Tensor]:
        return {}

    def basis(self, moment: Tensor) -> Tensor:
        """(D, R) the fewest eigenvectors that hold `energy` of the trace of `moment` (D, D)."""
        values, vectors = torch.linalg.eigh(moment)  # ascending
        share = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
        rank = int((share < self.energy - 1e-12).sum()) + 1  # what is under 1e-12 is rounding
        leading: Tensor = vectors.flip(1)[:, :rank]
        return leading
