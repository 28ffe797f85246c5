"""What all contestants share: a seeded random model of a real architecture on disk, and random rows.

The model is saved under hub names, so that it loads through our Checkpoint and through `from_pretrained` alike.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import log
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from seuf_ray.data.rows import Row

STEERING = 20.0  # c of RMU

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 320,
        "shared_expert_intermediate_size": 640,
        "intermediate_size": 1024,
    },
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "intermediate_size": 10944,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
}


@dataclass(frozen=True)
class Setting:
    """What all contestants share."""

    folder: Path
    device: str
    layers: int
    rows: int
    length: int
    rounds: int
    vocab: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def target(self) -> tuple[int, int]:
        return self.layers // 2, 5

    def data(self, seed: int) -> list[Row]:
        """`rows` random rows of `length` tokens."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.vocab, (self.rows, self.length), generator=generator)
        return [Row(tuple(row)) for row in ids.tolist()]

    def ids(self, seed: int) -> Tensor:
        """(B, T) the same rows as a peer reads them."""
        return torch.tensor([row.ids for row in self.data(seed)], device=self.device)


def control(hidden_size: int, setting: Setting) -> Tensor:
    """(D,) `c u`: a seeded unit vector times the steering coefficient."""
    vector = torch.rand(hidden_size, generator=torch.Generator().manual_seed(0))
    return (STEERING * vector / vector.norm()).to(setting.device, setting.dtype)


@contextlib.contextmanager
def saved_model(shape: str, layers: int | None, device: str) -> Iterator[Path]:
    """A folder with the seeded random model under hub names."""
    values = {**SHAPES[shape], "max_position_embeddings": 4096}
    values["num_hidden_layers"] = layers or values["num_hidden_layers"]
    config = AutoConfig.for_model(**values)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        log(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
        model.save_pretrained(folder)
        del model
        yield Path(folder)
