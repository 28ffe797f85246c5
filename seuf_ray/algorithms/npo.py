"""Negative preference optimisation: ascent that slows down as a sequence becomes less likely than it was.

    L = -(2 / beta) * mean over sequences of log sigmoid(-beta * (S - S_ref)) + retain term
    S = summed log-probability of a sequence's counted tokens, S_ref the original's

At the original the gradient is that of mean S: gradient ascent on sequence sums, whatever beta; beta -> 0 keeps it so.
Source: NPO (arXiv 2404.05868), Eq. 3; open-unlearning `NPO`, of which this is the formula. Theirs deep-copies the
model for S_ref; here the original is a switch away. (SEUF's authors ran beta = 0.001.)
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.retain import Retaining


class NegativePreference(Retaining):
    name: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0, description="how soon the ascent slows down; 0 would be gradient ascent")

    def loss(
        self,
        forget: Forward,
        forget_ref: Forward,
        retain: Forward | None = None,
        retain_ref: Forward | None = None,
    ) -> dict[str, Tensor]:
        ratio = forget.sequence_logps() - forget_ref.sequence_logps()  # (B,)
        value = -2 / self.beta * forget.mean_sequences(F.logsigmoid(-self.beta * ratio))
        return {"forget": value, **self.retain_term(retain, retain_ref)}
