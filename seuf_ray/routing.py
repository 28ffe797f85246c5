"""Router logits -> scores, distributions, drift against the original, and exact statistics.

    s = softmax(z)            gates g_i = s_i if i in TopK else 0          (Qwen, Mixtral, OLMoE, DeepSeek-V2)
    s = sigmoid(z)            distribution for KL: s / sum(s)              (DeepSeek-V3, R1)

Statistics are (sum, count) added in fixed point: int64 addition is associative, so any sharding, order or retry
gives the same bits, where float64 sums of the same numbers over 20 orders gave 16 different results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seuf_ray.families import Scoring

FIXED_POINT = 2**32  # one unit of score; int64 then holds 2e9 tokens at score 1


def scores(logits: Tensor, scoring: Scoring) -> Tensor:
    """(..., E) scores `s` in float32 of router `logits` (..., E), before any top-k or renormalisation."""
    return logits.float().sigmoid() if scoring == "sigmoid" else logits.float().softmax(dim=-1)


def log_distribution(logits: Tensor, scoring: Scoring) -> Tensor:
    """(..., E) log of the routing distribution that KL compares."""
    if scoring == "softmax":
        return logits.float().log_softmax(dim=-1)
    # log(s / sum(s)); log_softmax takes the maximum off first, without which very negative logits lose the sum
    return torch.nn.functional.logsigmoid(logits.float()).log_softmax(dim=-1)


def gates(score: Tensor, choices: Tensor) -> Tensor:
    """(..., E) gate values: the score at chosen experts, else 0.

    Args:
        score: (..., E) from `scores`.
        choices: (..., K) chosen expert indices; the router chooses, so group limits and biases are respected.
    """
    return torch.zeros_like(score).scatter(-1, choices, score.gather(-1, choices))


def kl(reference_logits: Tensor, logits: Tensor, scoring: Scoring) -> Tensor:
    """(...,) KL(p_original || p_current) of the routing distributions, nats per token; 0 where they agree."""
    reference = log_distribution(reference_logits, scoring)
    return (reference.exp() * (reference - log_distribution(logits, scoring))).sum(dim=-1)


def overlap(reference_choices: Tensor, choices: Tensor) -> Tensor:
    """(...,) share of the K experts chosen by the original that are still chosen (order does not matter)."""
    same = (reference_choices[..., :, None] == choices[..., None, :]).any(dim=-1)
    return same.float().mean(dim=-1)


def top1(logits: Tensor, choices: Tensor) -> Tensor:
    """(N,) the chosen expert with the highest logit, of equals the lowest; `choices` (N, K) need no order."""
    ordered = choices.sort(dim=1).values
    best = logits.gather(1, ordered).argmax(dim=1, keepdim=True)
    return ordered.gather(1, best).squeeze(1)


def drift(
    reference_logits: Tensor, reference_choices: Tensor, logits: Tensor, choices: Tensor, scoring: Scoring
) -> dict[str, Tensor]:
    """How far the routing of N tokens moved in one layer: (N,) overlap of the first choice, of all K, and KL."""
    same = top1(reference_logits, reference_choices) == top1(logits, choices)
    return {
        "overlap_top1": same.float(),
        "overlap_topk": overlap(reference_choices, choices),
        "kl": kl(reference_logits, logits, scoring),
    }


def to_fixed(values: Tensor) -> Tensor:
    """int64 fixed point of non-negative `values`."""
    return (values.double() * FIXED_POINT).round().to(torch.int64)


def sequence_means(values: Tensor, lengths: list[int]) -> Tensor:
    """(B, E) mean over each sequence's tokens.

    Args:
        values: (N, E), the real tokens of B sequences one after the other.
        lengths: B numbers of tokens, adding up to N.
    """
    return torch.stack([part.double().mean(dim=0) for part in torch.split(values, lengths)])
