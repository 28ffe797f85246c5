"""Report + rule -> UnlearningPlan: which tensors will train.

    model       the top-M (layer, expert) pairs of the whole model, and the routers of their layers
    layer       the top-M of every MoE layer
    same_layer  the top-M of the layer that holds the best one
    random      M seeded ones, explicit: those that are named

and the baselines, plans like any other:

    esft        of every layer the best experts until their share of its score is reached; routers do not train
    full        every parameter          experts  all routed experts       routers  all routers
    shared      all shared experts       lora     adapters on attention and routed experts
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from seuf_ray.artifacts import AttributionReport, Expert, LoRA, Provenance, UnlearningPlan, provenance
from seuf_ray.attribution.esft import esft_experts, read_experts
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import JobConfig, TargetsConfig
from seuf_ray.errors import ConfigError
from seuf_ray.families import PARTS, Shape

RANKED = ("model", "layer", "same_layer", "random", "explicit")


def plan_for(config: JobConfig, report: AttributionReport, checkpoint: Checkpoint) -> UnlearningPlan:
    """The plan of a job from a report on its model; raises what `choose_targets` raises."""
    made = provenance(config.seed, attribution=report.fingerprint, model=report.model.fingerprint)
    trains = config.anchor.name != "frozen"
    return choose_targets(report, config.targets, checkpoint, made, train_routers=trains)


def choose_targets(
    report: AttributionReport,
    targets: TargetsConfig,
    checkpoint: Checkpoint,
    made: Provenance,
    *,
    train_routers: bool = True,
) -> UnlearningPlan:
    """The plan of `targets.scope`; never an empty one.

    Raises:
        ConfigError: top-M over what there is, an expert or a kind of tensor that the model does not have, or routers
            that must and must not train.
    """
    scope, shape, family = targets.scope, checkpoint.shape, checkpoint.family
    if scope in ("full", "routers") and not train_routers:
        raise ConfigError(
            f"targets.scope = {scope!r} trains every router: choose another anchor.name than 'frozen'"
        )
    experts = _select(report, targets, shape, made.seed)
    layers = sorted({layer for layer, _ in experts}) if experts else list(shape.moe_layers)
    routers = layers if train_routers and scope in (*RANKED, "routers", "full") else []
    names = [family.expert_tensor(layer, e, part) for layer, e in experts for part in PARTS]
    if scope != "full":
        names += [family.router_tensor(layer) for layer in routers] + _whole(scope, checkpoint)
    lora = LoRA(rank=targets.lora_rank, alpha=targets.lora_alpha) if scope == "lora" else None
    numel = _adapters(names, checkpoint, lora.rank) if lora else _numel(names, checkpoint)
    return UnlearningPlan(
        model=report.model,
        provenance=made,
        scope=scope,
        top_m=targets.top_m,
        experts=experts,
        routers=routers,
        tensors=sorted(names),
        num_trainable=numel,
        trainable_fraction=numel / checkpoint.num_parameters,
        lora=lora,
    )


def _whole(scope: str, checkpoint: Checkpoint) -> list[str]:
    """Checkpoint names of the baselines that train or adapt a kind of tensor in every MoE layer.

    Raises:
        ConfigError: the model has no such tensor.
    """
    family, layers = checkpoint.family, checkpoint.shape.moe_layers
    blocks = tuple(f"model.layers.{layer}.{family.block}.shared_expert" for layer in layers)
    kinds: dict[str, Callable[[str], bool]] = {
        "experts": lambda name: (at := family.parse_expert(name)) is not None and at[0] in layers,
        "shared": lambda name: name.startswith(blocks),
        "lora": lambda name: _is_adapted(name, checkpoint),
    }
    if scope not in kinds:
        return []
    if not (names := [name for name in checkpoint.files if kinds[scope](name)]):
        raise ConfigError(f"targets.scope = {scope!r}: a {family.model_type} model has no such tensors")
    return names


def _is_adapted(name: str, checkpoint: Checkpoint) -> bool:
    """Attention projections of all layers, and routed experts; not those of heads for several next tokens."""
    layer = name.split(".")[2] if name.startswith("model.layers.") else ""
    if not layer or int(layer) >= checkpoint.shape.num_layers:
        return False
    is_attention = ".self_attn." in name and name.endswith(".weight") and len(checkpoint.info(name)[1]) == 2
    return is_attention or checkpoint.family.parse_expert(name) is not None


def _numel(names: list[str], checkpoint: Checkpoint) -> int:
    return sum(int(np.prod(checkpoint.info(name)[1])) for name in names) or checkpoint.num_parameters


def _adapters(names: list[str], checkpoint: Checkpoint, rank: int) -> int:
    """Parameters of A and B; gate and up of an expert are one tensor, and share their A."""
    parsed = {name: checkpoint.family.parse_expert(name) for name in names}
    sizes = {name: checkpoint.info(name)[1] for name in names}
    return sum(
        rank * (sizes[name][0] + (0 if at and at[2] == "up" else sizes[name][1]))
        for name, at in parsed.items()
    )


def _select(report: AttributionReport, targets: TargetsConfig, shape: Shape, seed: int) -> list[Expert]:
    if targets.scope == "esft":
        return sorted(esft_experts(report, targets.share))
    if targets.scope not in RANKED:
        return []
    if targets.scope == "explicit":
        return explicit_experts(targets, shape)
    ranked = [expert for _, expert in report.ranked()]
    pools = _pools(ranked, targets.scope, seed)
    smallest = min(len(pool) for pool in pools)
    if targets.top_m > smallest:
        raise ConfigError(
            f"targets.top_m = {targets.top_m}: scope {targets.scope!r} has only {smallest} experts to choose from"
        )
    return sorted(expert for pool in pools for expert in pool[: targets.top_m])


def explicit_experts(targets: TargetsConfig, shape: Shape) -> list[Expert]:
    """The experts that scope = explicit names, itself or in a file of ESFT's.

    Raises:
        ConfigError: the model does not have one of them, or the file cannot be read as such.
    """
    named = targets.experts or []
    experts = read_experts(named) if isinstance(named, Path) else named
    return [_existing(layer, expert, shape) for layer, expert in sorted(set(experts))]


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
