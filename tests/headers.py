"""Checkpoints of real sizes without their weights: config.json, true headers, and shards that are holes.

header_only(folder, "deepseek_v3", DEEPSEEK_V3)  ->  671 B parameters in a few megabytes of disk
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from seuf_ray.checkpoint.naming import place, stored_names
from seuf_ray.families import FAMILIES, shape_of

SHARD_PARAMETERS = 2 * 10**9  # as on the hub; a file is mapped while its header is checked
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
# The sizes of each model's config.json on the hub.
QWEN = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 5632, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None, **_MLA,
}  # fmt: skip
MIXTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK_V3 = {
    "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536,
    "n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 0, **_MLA,
}  # fmt: skip


def header_only(folder: Path, family: str, sizes: dict[str, Any]) -> Path:
    """A bfloat16 checkpoint of this model whose tensors all read as zero; returns `folder`."""
    config = AutoConfig.for_model(family, **sizes)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    num_experts = shape_of(json.loads((folder / "config.json").read_text())).num_experts
    shards: list[dict[str, torch.Size]] = [{}]
    for path, tensor in model.state_dict().items():
        for name in stored_names(FAMILIES[family], path, num_experts):
            if sum(shape.numel() for shape in shards[-1].values()) > SHARD_PARAMETERS:
                shards.append({})
            shards[-1][name] = place(FAMILIES[family], name).of(tensor).shape
    names = {name: f"model-{number:05d}.safetensors" for number, part in enumerate(shards) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for part in shards:
        _write_hole(folder / names[next(iter(part))], part)
    return folder


def _write_hole(path: Path, shapes: dict[str, torch.Size]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
