"""Simple NPO: no reference; the mean log-probability of a sequence takes the place of the ratio to the original.

    L = -(2 / beta) * mean over sequences of log sigmoid(-beta * S / length - gamma) + retain term
    S = summed log-probability of a sequence's counted tokens, length their number

For sequences of one length this is NPO with beta / length and the constant reference S_ref = -gamma * length / beta,
divided by length. The length takes away NPO's bias towards long sequences.
Source: SimNPO (arXiv 2410.07163), Eq. 4; open-unlearning `SimNPO`, whose margin `delta` is gamma / beta. Theirs takes
the length from the labels before they are shifted, one too many for a row without a prompt; ours counts what S sums.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.retain import Retaining


class SimpleNegativePreference(Retaining):
    name: Literal["simnpo"] = "simnpo"
    beta: float = Field(4.5, gt=0, description="how soon the ascent slows down")
    gamma: float = Field(0.0, description="margin; a positive one lets the ascent go further")

    def loss(
        self, forget: Forward, retain: Forward | None = None, retain_ref: Forward | None = None
    ) -> dict[str, Tensor]:
        mean_logp = forget.sequence_logps() / forget.mask.sum(dim=1).clamp(min=1)  # (B,)
        preferred = F.logsigmoid(-self.beta * mean_logp - self.gamma)
        value = -2 / self.beta * forget.mean_sequences(preferred)
        return {"forget": value, **self.retain_term(retain, retain_ref)}
