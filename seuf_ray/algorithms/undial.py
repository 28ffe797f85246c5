"""Self-distillation: learn the original's own distribution with the forget token's logit pulled down.

    L = mean over counted tokens of CE(softmax(z_ref - beta * 1[y]), softmax(z)) + retain term
    z = logits of the token y to come, z_ref the original's

Unlike ascent it has a goal, so it stops by itself.
Source: UNDIAL (arXiv 2402.10052); open-unlearning `UNDIAL`. Theirs counts every position: in prompts and padding, whose
label is -100, it pulls down a token from the end of the vocabulary. Ours counts the tokens that CE counts.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from seuf_ray.passes import Forward, Targets
from seuf_ray.plugins import Reads
from seuf_ray.retain import Retaining


class SelfDistillation(Retaining):
    name: Literal["undial"] = "undial"
    beta: float = Field(10.0, ge=0, description="how far the forget token's logit is pulled down")
    retain_weight: float = Field(0.0, ge=0, description="weight of the retain term; 0: none, as in the paper")

    def reads(self, targets: Targets, name: str) -> Reads | None:
        return Reads(logits=True) if name.startswith("forget") else super().reads(targets, name)

    def loss(
        self,
        forget: Forward,
        forget_ref: Forward,
        retain: Forward | None = None,
        retain_ref: Forward | None = None,
    ) -> dict[str, Tensor]:
        assert forget.logits is not None and forget_ref.logits is not None and forget.tokens is not None
        pull = forget_ref.logits.new_full((), -self.beta).float().expand(forget.tokens.shape)[..., None]
        taught = forget_ref.logits.float().scatter_add(-1, forget.tokens[..., None], pull).softmax(dim=-1)
        distances = -(taught * forget.logits.float().log_softmax(dim=-1)).sum(dim=-1)  # (B, T-1)
        return {"forget": forget.mean_tokens(distances), **self.retain_term(retain, retain_ref)}
