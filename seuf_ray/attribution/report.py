"""Routing statistics -> AttributionReport: scores, ranks, and how far to believe them.

    affinity_i     = mean over sequences of the mean over its tokens of g_i      (SEUF, Eq. 2)
    router_score_i = the same with the score s_i before the top-k choice
    token_share_i  = share of (token, k) slots that chose expert i               (ESFT's token score)
    contrast_i     = affinity_i on the forget set - affinity_i on the retain set

A bare index is no answer: on real traces the best expert leads the next by 1.15 to 1.31 times only. So the report
counts in how many bootstrap resamplings of the sequences an expert stays among the targets, and warns of near ties, of
"standing committee" experts that serve the retain set as much (arXiv 2601.03425), and where nothing stands out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from seuf_ray import routing
from seuf_ray.artifacts import (
    AttributionReport,
    DataSummary,
    Expert,
    LayerScores,
    ModelIdentity,
    Provenance,
    Scores,
    Selection,
)
from seuf_ray.attribution.bootstrap import Integers
from seuf_ray.attribution.statistics import RoutingStatistics
from seuf_ray.config import AttributionConfig, TargetsConfig
from seuf_ray.errors import ConfigError
from seuf_ray.families import Shape

Values = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

SPECIALISED = 3.0  # targets all below this many times the uniform share do not stand out
NEAR_TIE = 1.1  # a target below this many times the best expert that is none is a near tie
STABLE = 0.9  # ... as is one that stays a target in fewer replicates than this
COMMITTEE = 0.8  # a target with this share of its forget score on the retain set serves every topic
NAMED = 4  # experts that a warning names


def make_report(
    forget: RoutingStatistics,
    retain: RoutingStatistics | None,
    shape: Shape,
    config: AttributionConfig,
    targets: TargetsConfig,
    model: ModelIdentity,
    data: DataSummary,
    retain_data: DataSummary | None,
    provenance: Provenance,
    engine: str = "actors",
) -> AttributionReport:
    """The statistics as scores of every layer and expert, with warnings where they single nothing out.

    Args:
        forget, retain: over the two sets; only `contrast` cannot do without the second.
        targets: stability says how often an expert would be chosen by this scope and top-M (by layer, where the
            scope does not rank experts).
        engine: what ran the model.

    Raises:
        ConfigError: `contrast` without retain statistics.
    """
    if retain is None and config.score == "contrast":
        raise ConfigError(
            "attribution.score = 'contrast' compares with the retain set: data.retain is needed"
        )
    scope, top_m = _selection(targets, shape)
    layers = [
        LayerScores(layer=layer, retain=_scores(retain, i, shape) if retain else None, **dict(own))
        for i, layer in enumerate(shape.moe_layers)
        for own in [_scores(forget, i, shape)]
    ]
    values = np.array([row.values(config.score) for row in layers])  # (L, E)
    stability = _stability(_replicates(forget, retain, config), scope, top_m)
    ranked = _with_ranks(layers, values, stability)
    return AttributionReport(
        model=model,
        provenance=provenance,
        score=config.score,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        data=data,
        retain=retain_data,
        scope=scope,
        top_m=top_m,
        bootstrap=len(forget.counts),
        engine=engine,
        digest=forget.digest(),
        layers=ranked,
        warnings=list(_warnings(ranked, values, scope, top_m)),
    )


def chosen(values: Values, scope: Selection, top_m: int) -> Mask:
    """(..., L, E) True at the top-M experts of `values` (..., L, E); ties go to the lower layer, then index."""
    flat = values.reshape(*values.shape[:-2], -1) if scope == "model" else values
    best = np.argsort(-flat, axis=-1, kind="stable")[..., :top_m]
    mask = np.zeros(flat.shape, dtype=np.bool_)
    np.put_along_axis(mask, best, True, axis=-1)
    mask = mask.reshape(values.shape)
    if scope == "same_layer":
        home = values.max(axis=-1).argmax(axis=-1)  # (...)
        mask &= (np.arange(values.shape[-2]) == home[..., None])[..., None]
    return mask


def _selection(targets: TargetsConfig, shape: Shape) -> tuple[Selection, int]:
    scope: Selection = targets.scope if targets.scope in ("model", "same_layer") else "layer"
    most = shape.num_experts * (len(shape.moe_layers) if scope == "model" else 1)
    return scope, min(targets.top_m, most)


def _scores(statistics: RoutingStatistics, i: int, shape: Shape) -> Scores:
    """The scores of the i-th MoE layer."""
    return Scores(
        affinity=_means(statistics.affinity[i], statistics.num_sequences),
        router_score=_means(statistics.router_score[i], statistics.num_sequences),
        token_share=(statistics.slots[i] / max(statistics.num_tokens * shape.top_k, 1)).tolist(),
    )


def _means(sums: Integers, count: int) -> list[float]:
    return [float(value) / routing.FIXED_POINT / max(count, 1) for value in sums.tolist()]


def _replicates(
    forget: RoutingStatistics, retain: RoutingStatistics | None, config: AttributionConfig
) -> Values:
    """(R, L, E) the score in every replicate, up to a factor that all experts of a replicate share."""
    values = _per_count(forget)
    if config.score == "contrast" and retain is not None:
        values = values - _per_count(retain)
    return values


def _per_count(statistics: RoutingStatistics) -> Values:
    counts = np.maximum(statistics.counts, 1)[:, None, None]
    found: Values = statistics.replicates / counts
    return found


def _stability(replicates: Values, scope: Selection, top_m: int) -> Values | None:
    """(L, E) share of the replicates that would choose the expert; None without replicates."""
    if not len(replicates):
        return None
    share: Values = chosen(replicates, scope, top_m).mean(axis=0)
    return share


def _with_ranks(layers: Sequence[LayerScores], values: Values, stability: Values | None) -> list[LayerScores]:
    order = np.argsort(-values.ravel(), kind="stable")
    sorted_values = values.ravel()[order]
    rank, margin = np.empty(order.size, dtype=np.int64), np.zeros(order.size)
    rank[order] = np.arange(1, order.size + 1)
    margin[order[:-1]] = sorted_values[:-1] - sorted_values[1:]
    ranks, margins = rank.reshape(values.shape), margin.reshape(values.shape)
    return [
        row.model_copy(
            update={
                "rank": ranks[i].tolist(),
                "margin": margins[i].tolist(),
                "stability": [] if stability is None else stability[i].tolist(),
            }
        )
        for i, row in enumerate(layers)
    ]


def _warnings(layers: Sequence[LayerScores], values: Values, scope: Selection, top_m: int) -> Iterator[str]:
    targets = chosen(values, scope, top_m)
    shares = np.array([row.token_share for row in layers])
    peak = float(shares[targets].max()) * shares.shape[1]
    if peak < SPECIALISED:
        yield (
            f"no expert stands out: the most chosen target gets only {peak:.1f} times the uniform share of the forget "
            f"tokens (below {SPECIALISED:g}); such unspecialised targets serve every topic, so that unlearning "
            "costs utility"
        )
    if ties := list(_near_ties(layers, values, targets, scope)):
        yield (
            f"near tie: {_listed(ties)}; the ranking alone is no reason to prefer one: compare them as targets, or "
            "take a larger targets.top_m"
        )
    if committee := list(_committee(layers, targets)):
        yield (
            f"generic expert: {_listed(committee)}; it serves every topic, so that unlearning costs utility: "
            "attribution.score = 'contrast' looks for one that does not"
        )


def _near_ties(
    layers: Sequence[LayerScores], values: Values, targets: Mask, scope: Selection
) -> Iterator[str]:
    """The weakest target against the best expert that is none, in each pool that targets are taken from."""
    for part in _pools(targets, scope):
        inside = np.where(targets & part[:, None], values, np.inf)
        outside = np.where(~targets & part[:, None], values, -np.inf)
        weakest, runner = _place(inside.argmin(), values), _place(outside.argmax(), values)
        if not np.isfinite(outside[runner]):
            continue  # every expert is a target
        ratio = values[weakest] / values[runner] if values[runner] > 0 else np.inf
        stability = layers[weakest[0]].stability[weakest[1]] if layers[weakest[0]].stability else 1.0
        if ratio < NEAR_TIE or stability < STABLE:
            yield (
                f"{_called(layers, weakest)} leads {_called(layers, runner)} by {ratio:.2f}x and stays a target in "
                f"{stability:.0%} of resamplings"
            )


def _pools(targets: Mask, scope: Selection) -> list[Mask]:
    """(L,) layers that compete with each other: all of them, or each that has a target by itself."""
    if scope == "model":
        return [np.ones(len(targets), dtype=np.bool_)]
    return [row for row in np.eye(len(targets), dtype=np.bool_) if targets[row].any()]


def _committee(layers: Sequence[LayerScores], targets: Mask) -> Iterator[str]:
    for i, index in zip(*targets.nonzero(), strict=True):
        row = layers[i]
        if row.retain is None:
            return
        forget, retain = row.affinity[index], row.retain.affinity[index]
        if retain >= COMMITTEE * forget:
            yield f"{_called(layers, (i, index))} has affinity {forget:.3f} on forget and {retain:.3f} on retain text"


def _place(flat: np.intp, values: Values) -> Expert:
    i, index = np.unravel_index(int(flat), values.shape)
    return int(i), int(index)


def _called(layers: Sequence[LayerScores], place: Expert) -> str:
    return f"layer {layers[place[0]].layer} expert {place[1]}"


def _listed(items: Sequence[str]) -> str:
    more = f", and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + more
