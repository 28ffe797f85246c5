"""Whether a model can do what a job asks: experts to share and to choose from, and something for an anchor to hold."""

from __future__ import annotations

from seuf_ray import artifacts
from seuf_ray.attribution.selection import explicit_experts
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import JobConfig
from seuf_ray.errors import ConfigError
from seuf_ray.model.lora import require_peft

# Anchors of target experts, and of routers that train: where a scope has none.
MISSING_FOR = {
    "full": ("frozen", "onehot"),
    "routers": ("frozen", "onehot"),
    "experts": ("onehot", "nullspace"),
    "shared": ("onehot", "nullspace"),
    "lora": ("onehot", "nullspace"),
    "esft": ("nullspace",),
}


def check_job(config: JobConfig, checkpoint: Checkpoint) -> None:
    """Whether the model can do what the job asks, with what is installed; raises ConfigError where it cannot."""
    if config.targets.scope == "lora":
        require_peft()
    _check_parallelism(config, checkpoint)
    _check_targets(config, checkpoint)


def _check_parallelism(config: JobConfig, checkpoint: Checkpoint) -> None:
    parallel, experts = config.cluster.expert_parallel_size, checkpoint.shape.num_experts
    if experts % parallel:
        raise ConfigError(
            f"cluster.expert_parallel_size = {parallel} must divide this model's {experts} experts per layer"
        )
    if parallel > 1 and config.targets.scope in (*artifacts.IN_PLACE, "lora"):
        raise ConfigError(
            f"targets.scope = {config.targets.scope!r} trains in the model itself, whose experts would be spread over "
            "workers: set cluster.expert_parallel_size = 1 (scopes of experts and routers run expert-parallel)"
        )


def _check_targets(config: JobConfig, checkpoint: Checkpoint) -> None:
    """Top-M is checked against the model before attribution spends any time."""
    shape, scope = checkpoint.shape, config.targets.scope
    most = shape.num_experts * (len(shape.moe_layers) if scope in ("model", "random") else 1)
    if scope == "explicit":
        explicit_experts(config.targets, shape)
    if config.anchor.name in MISSING_FOR.get(scope, ()):
        raise ConfigError(
            f"anchor.name = {config.anchor.name!r} is about target experts or routers that train, targets.scope = "
            f"{scope!r} has none: not allowed here are {', '.join(MISSING_FOR[scope])}"
        )
    if config.anchor.name == "nullspace" and config.cluster.zero_stage > 0:
        raise ConfigError(
            "anchor.name = 'nullspace' changes routers after each step, and "
            f"cluster.zero_stage = {config.cluster.zero_stage} spreads them over workers: set cluster.zero_stage = 0"
        )
    if scope in ("model", "layer", "same_layer", "random") and config.targets.top_m > most:
        raise ConfigError(
            f"targets.top_m = {config.targets.top_m}: scope {scope!r} has only {most} experts to choose from "
            f"({len(shape.moe_layers)} MoE layers of {shape.num_experts})"
        )
