"""Direct preference optimisation with "I don't know" as the preferred answer.

    L = -(2 / beta) * mean over sequences of log sigmoid(beta * ((S_idk - S_idk_ref) - (S - S_ref))) + retain term
    S = summed log-probability of a sequence's counted tokens, S_ref the original's

Row by row, `idk` begins as `forget` does and goes on with `data.idk_answer` (see `data.idk_rows`). What they share has
the same log-probability in both and cancels, so counting all tokens counts the answers only.
Source: DPO (arXiv 2305.18290) as the unlearning baseline of TOFU and NPO; open-unlearning `DPO`, with its factor
2 / beta (DPO itself has 1). Theirs draws one of a hundred refusals for each question; ours has the one that the job
names, so that a row means the same in every epoch and its reference can be kept.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from seuf_ray.passes import Forward
from seuf_ray.retain import Retaining


class DirectPreference(Retaining):
    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="how soon a preference is strong enough")

    def loss(
        self,
        idk: Forward,
        idk_ref: Forward,
        forget: Forward,
        forget_ref: Forward,
        retain: Forward | None = None,
        retain_ref: Forward | None = None,
    ) -> dict[str, Tensor]:
        won = idk.sequence_logps() - idk_ref.sequence_logps()  # (B,)
        lost = forget.sequence_logps() - forget_ref.sequence_logps()
        value = -2 / self.beta * forget.mean_sequences(F.logsigmoid(self.beta * (won - lost)))
        return {"forget": value, **self.retain_term(retain, retain_ref)}
