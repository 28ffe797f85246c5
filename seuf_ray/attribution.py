"""Routing statistics -> AttributionReport.

    affinity_i     = mean over sequences of the mean over its tokens of g_i      (SEUF, Eq. 2)
    router_score_i = the same with the score s_i before the top-k choice
    token_share_i  = share of (token, k) slots that chose expert i               (ESFT's token score)

Sums are int64 fixed point per *unit* (a fixed group of rows, one forward pass), so any number of actors, order of
units or retry gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seuf_ray import routing
from seuf_ray.artifacts import (
    AttributionReport,
    DataSummary,
    LayerScores,
    ModelIdentity,
    Provenance,
)
from seuf_ray.config import AttributionConfig
from seuf_ray.families import Shape

Integers = npt.NDArray[np.int64]
SPECIALISED = 3.0  # a top expert below this many times the uniform share does not stand out


@dataclass(frozen=True)
class RoutingStatistics:
    """Exact sums over sequences and tokens, for L MoE layers and E experts.

    Attributes:
        affinity: (L, E) fixed point, summed per-sequence mean gates.
        router_score: (L, E) fixed point, summed per-sequence mean scores.
        slots: (L, E) times a (token, k) slot chose the expert.
        num_sequences, num_tokens: how many were seen.
    """

    affinity: Integers
    router_score: Integers
    slots: Integers
    num_sequences: int
    num_tokens: int

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        return RoutingStatistics(
            self.affinity + other.affinity,
            self.router_score + other.router_score,
            self.slots + other.slots,
            self.num_sequences + other.num_sequences,
            self.num_tokens + other.num_tokens,
        )

    def digest(self) -> str:
        """sha256 of every integer: equal digests mean bit-identical statistics."""
        arrays = (
            self.affinity,
            self.router_score,
            self.slots,
            np.array([self.num_sequences, self.num_tokens]),
        )
        return hashlib.sha256(b"".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()


def unit_statistics(
    logits: Mapping[int, Tensor], choices: Mapping[int, Tensor], lengths: Sequence[int], shape: Shape
) -> RoutingStatistics:
    """The statistics of one unit.

    Args:
        logits: layer -> (N, E) router logits of the unit's N real tokens, sequence after sequence.
        choices: layer -> (N, K) chosen experts.
        lengths: tokens of each sequence, adding up to N.
        shape: sizes and scoring of the model.
    """
    affinity, router_score, slots = [], [], []
    for layer in shape.moe_layers:
        score = routing.scores(logits[layer], shape.scoring)
        gate = routing.gates(score, choices[layer])
        affinity.append(routing.to_fixed(routing.sequence_means(gate, list(lengths))).sum(dim=0))
        router_score.append(routing.to_fixed(routing.sequence_means(score, list(lengths))).sum(dim=0))
        slots.append(torch.bincount(choices[layer].flatten(), minlength=shape.num_experts))
    a, r, s = (torch.stack(part).cpu().numpy() for part in (affinity, router_score, slots))
    return RoutingStatistics(a, r, s, num_sequences=len(lengths), num_tokens=sum(lengths))


def make_report(
    statistics: RoutingStatistics,
    shape: Shape,
    config: AttributionConfig,
    model: ModelIdentity,
    data: DataSummary,
    provenance: Provenance,
) -> AttributionReport:
    """The statistics as scores, with warnings where they do not single anything out."""
    layers = [
        LayerScores(
            layer=layer,
            affinity=_means(statistics.affinity[i], statistics.num_sequences),
            router_score=_means(statistics.router_score[i], statistics.num_sequences),
            token_share=(statistics.slots[i] / max(statistics.num_tokens * shape.top_k, 1)).tolist(),
        )
        for i, layer in enumerate(shape.moe_layers)
    ]
    return AttributionReport(
        model=model,
        provenance=provenance,
        score=config.score,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        data=data,
        digest=statistics.digest(),
        layers=layers,
        warnings=_warnings(layers, shape),
    )


def _means(sums: Integers, count: int) -> list[float]:
    return [float(value) / routing.FIXED_POINT / max(count, 1) for value in sums.tolist()]


def _warnings(layers: Sequence[LayerScores], shape: Shape) -> list[str]:
    """Said where experts do not specialise: there SEUF has nothing to hold on to."""
    peak = max(max(row.token_share) * shape.num_experts for row in layers)
    if peak >= SPECIALISED:
        return []
    return [
        f"no expert stands out: the most chosen one gets only {peak:.1f} times the uniform share of the forget tokens "
        f"(below {SPECIALISED:g}); such unspecialised targets serve every topic, so that unlearning costs utility"
    ]
