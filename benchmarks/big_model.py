"""A random checkpoint of DeepSeek-V2-Lite's shape, larger than a laptop's memory, written shard by shard.

    python benchmarks/big_model.py FOLDER [--layers N]        31 GB in bfloat16

One shard per layer and one for the rest; memory is one shard. Every tensor is a piece of one block of seeded normal
numbers, each from another place in it, with a spread of about 1 / sqrt(inputs): activations neither vanish nor explode,
and routing varies from token to token. The tokenizer is the embedded model's, so that jobs run on the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import log
from safetensors.torch import save_file
from setting import SHAPES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from seuf_ray import embedded
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.checkpoint.naming import place, stored_names
from seuf_ray.checkpoint.shards import INDEX
from seuf_ray.families import FAMILIES

BLOCK = 2**25  # normal numbers of which all tensors are made
STEP = 1_000_003  # between the places of two tensors; odd, so it visits the whole block


def write(folder: Path, layers: int | None = None) -> Checkpoint:
    """The checkpoint in `folder`, with the embedded model's tokenizer.

    Raises:
        SystemExit: the disk has no room for it.
    """
    values = {**SHAPES["deepseek_v2_lite"], "max_position_embeddings": 4096}
    values["num_hidden_layers"] = layers or values["num_hidden_layers"]
    config = AutoConfig.for_model(**values, dtype="bfloat16")
    folder.mkdir(parents=True, exist_ok=True)
    shapes = _shapes(config)
    _require_room(folder, 2 * sum(map(math.prod, shapes.values())))
    config.save_pretrained(folder)
    for path in embedded.checkpoint("specialised").glob("tokenizer*"):
        shutil.copy(path, folder)
    _write_shards(folder, shapes)
    return Checkpoint(folder)


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes, layer by layer."""
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: tuple(place(family, name).of(tensor).shape)
        for path, tensor in model.state_dict().items()
        for name in stored_names(family, path, config.n_routed_experts)
    }


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise SystemExit(f"{folder}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free")


def _write_shards(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    places = {name: number * STEP % BLOCK for number, name in enumerate(shapes)}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    for shard, names in shards.items():
        log(f"writing {folder / shard} ...")
        save_file({n: _values(block, places[n], shapes[n]) for n in names}, folder / shard, {"format": "pt"})
    files = {name: shard for shard, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")


def _values(block: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    """Ones for the scales of norms; otherwise normal numbers, with a power of two that is about 1 / sqrt(inputs)."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    flat, done = torch.empty(math.prod(shape), dtype=torch.bfloat16), 0
    for part in _pieces(block, start, len(flat)):
        flat[done : done + len(part)] = part
        done += len(part)
    return flat.mul_(2.0 ** round(-math.log2(shape[1]) / 2)).view(shape)


def _pieces(block: Tensor, start: int, size: int) -> Iterator[Tensor]:
    """`size` numbers of the block from `start` on, as often around as it takes."""
    while size:
        yield (part := block[start : start + size])
        start, size = 0, size - len(part)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers; default: the shape's own")
    given = parser.parse_args()
    checkpoint = write(given.folder, given.layers)
    log(f"{checkpoint.folder}: {checkpoint.num_parameters / 1e9:.1f} B parameters")


if __name__ == "__main__":
    main()
