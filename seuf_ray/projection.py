"""A weight whose change is kept out of a space, by projecting the change after each optimiser step.

    W <- W_0 + (W - W_0) (I - U U^T),   U (D, R) orthonormal:   W x = W_0 x for every x in the span of U

A gradient that is projected instead stays in the null space only until the optimiser divides it, entry by entry, by
its second moment, or decays the weight. The change is projected in float64, so that nothing but the rounding of W to
its own type is left of it in the span.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """One weight (E, D), what it was, and the directions `basis` (D, R) in which it stays that."""

    weight: nn.Parameter
    original: Tensor
    basis: Tensor

    @torch.no_grad()
    def apply(self) -> None:
        """Take out of the weight's change what lies in the span of the basis."""
        original = self.original.double()
        change = self.weight.double() - original
        self.weight.copy_(original + change - (change @ self.basis) @ self.basis.T)
