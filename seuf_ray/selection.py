"""Report + rule -> UnlearningPlan: which tensors will train (method.md section 3, selection).

model       the top-M (layer, expert) pairs of the whole model, and the routers of their layers
layer       the top-M of every MoE layer
same_layer  the top-M of the layer that holds the best one
random      M seeded ones, explicit: those that are named, full: every parameter
"""

from __future__ import annotations

import random

import numpy as np

from seuf_ray.artifacts import AttributionReport, Expert, Provenance, UnlearningPlan
from seuf_ray.checkpoint import Checkpoint
from seuf_ray.config import TargetsConfig
from seuf_ray.errors import ConfigError
from seuf_ray.families import PARTS, Shape


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
