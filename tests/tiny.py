"""Tiny random checkpoints of every family in `seuf_ray.families`: 3 layers, hidden 32, 8 experts, top-2.

    save_tiny(folder, "deepseek_v3", seed=1)  ->  a sharded Hugging Face folder, no tokenizer

Weights are normal with a spread that makes routing vary from token to token, which transformers' own
initialisation (0.02) does not at this size. DeepSeek's first layer is dense; V3 chooses one of two groups of
experts and carries a correction bias, V2 is greedy like V2-Lite.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from seuf_ray.artifacts import Provenance, UnlearningPlan
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.families import FAMILIES, PARTS

FAMILY_NAMES = tuple(FAMILIES)
PROVENANCE = Provenance(seed=0, made_from={}, packages={})
VOCAB = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK: dict[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
    },
    "qwen3_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "num_experts": 8,
        "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": 16, "num_experts": 8},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0},
    "mixtral": {"intermediate_size": 16, "num_local_experts": 8},
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of the tiny model of `family` (a `model_type`), with `changes`."""
    return AutoConfig.for_model(family, **{**_COMMON, **_FAMILIES[family], **changes})


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A tiny causal LM whose values depend on `family`, `seed` and what `changes` in its configuration only."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator)
            is_scale = tensor.ndim == 1 and "norm" in name
            tensor.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)
    return model.to(dtype).eval()


def tiny_plan(base: Checkpoint, *experts: tuple[int, int]) -> UnlearningPlan:
    """The plan that trains these (layer, expert) and their routers; without any, everything."""
    layers = sorted({layer for layer, _ in experts})
    names = [base.family.expert_tensor(*expert, part) for expert in experts for part in PARTS]
    names += [base.family.router_tensor(layer) for layer in layers]
    numel = sum(math.prod(base.info(name)[1]) for name in names) or base.num_parameters
    return UnlearningPlan(
        model=base.identity("tiny"),
        provenance=PROVENANCE,
        scope="explicit" if experts else "full",
        top_m=max(len(experts), 1),
        experts=list(experts),
        routers=layers or list(base.shape.moe_layers),
        tensors=names,
        num_trainable=numel,
        trainable_fraction=numel / base.num_parameters,
    )


def save_tiny(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "50KB",
    **changes: Any,
) -> Path:
    """Save the tiny model of `family` under hub names, in several shards; returns `folder`."""
    tiny_model(family, dtype=dtype, seed=seed, **changes).save_pretrained(
        folder, max_shard_size=max_shard_size
    )
    return folder
