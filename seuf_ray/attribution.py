"""Routing statistics -> AttributionReport; report + rule -> UnlearningPlan.

    affinity_i     = mean over sequences of the mean over its tokens of g_i      (SEUF, Eq. 2)
    router_score_i = the same with the score s_i before the top-k choice
    token_share_i  = share of (token, k) slots that chose expert i               (ESFT's token score)

Sums are int64 fixed point per *unit* (a fixed group of rows, one forward pass), so any number of actors, order of
units or retry gives the same bits.
"""

from __future__ import annotations

import hashlib
import random
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
    Expert,
    LayerScores,
    ModelIdentity,
    Provenance,
    UnlearningPlan,
)
from seuf_ray.checkpoint import Checkpoint
from seuf_ray.config import AttributionConfig, TargetsConfig
from seuf_ray.errors import ConfigError
from seuf_ray.families import PARTS, Shape

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


def choose_targets(
    report: AttributionReport,
    targets: TargetsConfig,
    checkpoint: Checkpoint,
    provenance: Provenance,
    *,
    train_routers: bool = True,
) -> UnlearningPlan:
    """The plan of `targets.scope` (method.md section 3); never an empty one.

    Raises:
        ConfigError: top-M over what there is, an explicit expert that the model does not have, or everything but
            the routers.
    """
    if targets.scope == "full" and not train_routers:
        raise ConfigError(
            "targets.scope = 'full' trains every router: choose another anchor.name than 'frozen'"
        )
    experts = [] if targets.scope == "full" else _select(report, targets, checkpoint.shape, provenance.seed)
    layers = sorted({layer for layer, _ in experts}) if experts else list(checkpoint.shape.moe_layers)
    routers = layers if train_routers else []
    family = checkpoint.family
    names = [family.expert_tensor(layer, e, part) for layer, e in experts for part in PARTS]
    names += [family.router_tensor(layer) for layer in routers] if experts else []
    numel = sum(int(np.prod(checkpoint.info(name)[1])) for name in names) or checkpoint.num_parameters
    return UnlearningPlan(
        model=report.model,
        provenance=provenance,
        scope=targets.scope,
        top_m=targets.top_m,
        experts=experts,
        routers=routers,
        tensors=sorted(names),
        num_trainable=numel,
        trainable_fraction=numel / checkpoint.num_parameters,
    )


def _select(report: AttributionReport, targets: TargetsConfig, shape: Shape, seed: int) -> list[Expert]:
    if targets.scope == "explicit":
        return [_existing(layer, expert, shape) for layer, expert in sorted(set(targets.experts or []))]
    ranked = [expert for _, expert in report.ranked()]
    pools = _pools(ranked, targets.scope, seed)
    smallest = min(len(pool) for pool in pools)
    if targets.top_m > smallest:
        raise ConfigError(
            f"targets.top_m = {targets.top_m}: scope {targets.scope!r} has only {smallest} experts to choose from"
        )
    return sorted(expert for pool in pools for expert in pool[: targets.top_m])


def _pools(ranked: list[Expert], scope: str, seed: int) -> list[list[Expert]]:
    """The ranked lists that top-M is taken from."""
    if scope == "layer":
        return [[e for e in ranked if e[0] == layer] for layer in sorted({layer for layer, _ in ranked})]
    if scope == "same_layer":
        return [[e for e in ranked if e[0] == ranked[0][0]]]
    if scope == "random":
        return [random.Random(seed).sample(sorted(ranked), len(ranked))]
    return [ranked]


def _existing(layer: int, expert: int, shape: Shape) -> Expert:
    if layer not in shape.moe_layers or not 0 <= expert < shape.num_experts:
        raise ConfigError(
            f"targets.experts: [{layer}, {expert}] is not in this model; layers {shape.moe_layers[0]}-"
            f"{shape.moe_layers[-1]} have experts 0-{shape.num_experts - 1}"
        )
    return layer, expert
