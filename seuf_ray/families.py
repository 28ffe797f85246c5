"""One row per mixture-of-experts family: what differs in names, routing and expert-parallel preset.

Since transformers 5 all families share one module layout (`mlp.gate`, fused `mlp.experts`), so what is left to
tell apart is how hub checkpoints name their tensors, how router logits become scores, and which DeepSpeed AutoEP
preset replaces the MoE block. Adding a family is one row here and its tiny config in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from seuf_ray.errors import ConfigError, did_you_mean

Scoring = Literal["softmax", "sigmoid"]
Part = Literal["gate", "up", "down"]
PARTS: tuple[Part, ...] = ("gate", "up", "down")


@dataclass(frozen=True)
class Family:
    """What distinguishes one `model_type`.

    Attributes:
        block: the MoE block's name in hub checkpoints, under `model.layers.N.`.
        experts: hub names of the three projections of an expert, in the order gate, up, down.
        scoring: how router logits become scores (method: `softmax(z)` or `sigmoid(z)`).
        num_experts, top_k: keys of config.json.
        preset: DeepSpeed AutoEP preset.
    """

    model_type: str
    num_experts: str
    top_k: str = "num_experts_per_tok"
    block: str = "mlp"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    scoring: Scoring = "softmax"
    preset: str = "qwen3_moe"

    def expert_tensor(self, layer: int, expert: int, part: Part) -> str:
        """Checkpoint name of one projection: `model.layers.4.mlp.experts.5.down_proj.weight`."""
        projection = self.experts[PARTS.index(part)]
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{projection}.weight"

    def router_tensor(self, layer: int) -> str:
        """Checkpoint name of a router: `model.layers.4.mlp.gate.weight`, shape (E, D)."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def parse_expert(self, name: str) -> tuple[int, int, Part] | None:
        """(layer, expert, part) of an expert's checkpoint name, or None for any other tensor."""
        match = re.fullmatch(rf"model\.layers\.(\d+)\.{self.block}\.experts\.(\d+)\.(\w+)\.weight", name)
        if match is None or match[3] not in self.experts:
            return None
        return int(match[1]), int(match[2]), PARTS[self.experts.index(match[3])]


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen2_moe", "num_experts"),
        Family("qwen3_moe", "num_experts"),
        Family("olmoe", "num_experts"),
        Family("deepseek_v2", "n_routed_experts", preset="deepseek_v2"),
        Family("deepseek_v3", "n_routed_experts", preset="deepseek_v3", scoring="sigmoid"),
        Family(
            "mixtral",
            "num_local_experts",
            block="block_sparse_moe",
            experts=("w1", "w3", "w2"),
            preset="mixtral",
        ),
    )
}


@dataclass(frozen=True)
class Shape:
    """The sizes of an MoE model that plans and checks need."""

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    scoring: Scoring


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: a dense model, or an MoE family without a row in this file.
    """
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    kind = (
        "an unknown MoE family"
        if any("expert" in key for key in config)
        else "not a mixture-of-experts model"
    )
    raise ConfigError(
        f"model_type {model_type!r} is {kind}; {did_you_mean(model_type, FAMILIES)} (a new one is a row in families.py)"
    )


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Layers with experts, experts per layer and top-k, from a config.json.

    Raises:
        ConfigError: a key is missing, or no layer has routed experts.
    """
    family = family_of(config)
    num_layers = _required(config, "num_hidden_layers")
    layers = tuple(layer for layer in range(num_layers) if _has_experts(config, layer))
    num_experts = config.get(family.num_experts, config.get("num_local_experts", config.get("num_experts")))
    if not layers or not num_experts:
        raise ConfigError(f"model_type {family.model_type!r}: this model has no layer with routed experts")
    return Shape(num_layers, layers, int(num_experts), _required(config, family.top_k), family.scoring)


def _required(config: Mapping[str, Any], key: str) -> int:
    if key not in config:
        raise ConfigError(f"config.json: key {key!r} is missing")
    return int(config[key])


def _has_experts(config: Mapping[str, Any], layer: int) -> bool:
    if layer < int(config.get("first_k_dense_replace") or 0) or layer in (
        config.get("mlp_only_layers") or ()
    ):
        return False
    if kinds := config.get("mlp_layer_types"):
        return bool(kinds[layer] == "sparse")
    step = int(config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1)
    return layer % step == 0 if "moe_layer_freq" in config else (layer + 1) % step == 0
