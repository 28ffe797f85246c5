"""The retain term that most algorithms share.

    nll    CE(retain)                                       mean token NLL over counted tokens
    kl     mean over counted tokens of KL(p_ref || p)       p over the whole vocabulary, given the tokens before

Source: open-unlearning `GradDiff.compute_retain_loss`, `NLL` and `KL`. Their KL counts padding and prompts too, and
divides by the number of positions; ours counts what CE counts.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from seuf_ray import routing
from seuf_ray.passes import Forward, Targets
from seuf_ray.plugins import Plugin, Reads


class Retaining(Plugin):
    """Base of an algorithm whose `loss` takes `retain` and `retain_ref` and adds `retain_term` of them."""

    retain_weight: float = Field(
        1.0, ge=0, description="weight of the retain term; 0: none (open-unlearning: alpha)"
    )
    retain: Literal["nll", "kl"] = Field(
        "nll", description="retain term: nll of the retain tokens, or kl to the original's distributions"
    )

    def reads(self, targets: Targets, name: str) -> Reads | None:
        if not name.startswith("retain"):
            return Reads()
        is_needed = self.retain_weight > 0 and (name == "retain" or self.retain == "kl")
        return Reads(logits=self.retain == "kl") if is_needed else None

    def retain_term(self, retain: Forward | None, retain_ref: Forward | None) -> dict[str, Tensor]:
        """The named term, weighted; nothing without a weight."""
        if retain is None or self.retain_weight == 0:
            return {}
        value = retain.nll() if self.retain == "nll" else _kl(retain, retain_ref)
        return {"retain": self.retain_weight * value}


def _kl(current: Forward, reference: Forward | None) -> Tensor:
    """Mean KL(reference || current) of the next-token distributions, nats per counted token."""
    assert reference is not None and reference.logits is not None and current.logits is not None
    return current.mean_tokens(routing.kl(reference.logits, current.logits, "softmax"))
