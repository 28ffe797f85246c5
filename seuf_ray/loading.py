"""From a checkpoint folder to a model in memory, tensor by tensor, without a second copy of anything.

The model is built with its weights allocated but neither initialised nor touched, which costs address space and no
memory. Then each checkpoint tensor is read straight into the slice of the (fused) parameter that it is, layer by
layer. A rank that owns some experts reads those only: pages of the others are never touched, and DeepSpeed AutoEP
clones the owned slices before it drops the fused parameters. transformers' own loading gives the same bits, but reads
all experts on every rank. The only importer of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seuf_ray.checkpoint import Checkpoint
from seuf_ray.errors import ConfigError
from seuf_ray.naming import place, stored_names

Progress = Callable[[int, int], None]
Parts = Mapping[str, list[str]]  # parameter or buffer of the model -> checkpoint tensors that it is made of


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    owned: range | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """The checkpoint's causal LM, frozen, in evaluation mode: bit for bit what `from_pretrained` gives.

    Args:
        dtype: of all weights; what the family keeps in float32 (DeepSeek-V3's correction bias) stays so.
        device: where. Each parameter moves as soon as it is whole.
        owned: the experts to read, of every layer; the slices of others hold nothing. The model then stays on
            the CPU whatever `device` is, until the engine has taken the owned slices and moves those.
        progress: called with (tensors read, tensors to read) after each.

    Raises:
        ConfigError: the checkpoint lacks a tensor of the model, has one of another shape, or has one that neither
            the model nor a multi-token-prediction head of its family knows.
        ValueError: `owned` reaches beyond the last expert.
    """
    # oneDNN on a busy CPU sometimes turns a 0.3 s step into 10 s; these sizes gain nothing from it.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    num_experts = checkpoint.shape.num_experts
    if owned is not None and not set(owned) <= set(range(num_experts)):
        raise ValueError(f"{owned} reaches beyond the last of {num_experts} experts")
    model = _untouched(checkpoint, dtype)
    parts = {path: stored_names(checkpoint.family, path, num_experts) for path in model.state_dict()}
    tied = _require_complete(checkpoint, parts, model.all_tied_weights_keys)
    _require_known(checkpoint, parts)
    target = torch.device("cpu" if owned is not None else device)
    _fill(
        model, checkpoint, {path: n for path, n in parts.items() if path not in tied}, owned, target, progress
    )
    model.tie_weights(missing_keys=tied, recompute_mapping=False)
    loaded: nn.Module = model.to(target)
    return loaded


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's fast tokenizer; remote code stays off."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        checkpoint.folder, local_files_only=True, trust_remote_code=False
    )
    tokenizer.model_max_length = (
        10**9
    )  # rows are cut by data.sequence_length; its own warning would only confuse
    return tokenizer


def _untouched(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model with its parameters allocated only; buffers that no checkpoint stores (rotary) are computed."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # in memory nothing is quantised
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False, experts_implementation="grouped_mm"
        )
    kept: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    for path, tensor in model.state_dict(keep_vars=True).items():
        if words := [word for word in kept if word in path]:
            tensor.data = tensor.data.to(kept[words[0]])
    return model.requires_grad_(False).eval()


def _require_complete(checkpoint: Checkpoint, parts: Parts, tied: Mapping[str, str]) -> set[str]:
    """Parameters without tensors of their own, because the checkpoint has those that they are tied to."""
    missing = {path: name for path, names in parts.items() for name in names if name not in checkpoint.files}
    partners = {source: path for path, source in tied.items()} | dict(tied)
    for path, name in missing.items():
        if partners.get(path, path) in missing:
            raise ConfigError(
                f"{checkpoint.folder}: tensor {name!r} is missing, which a {checkpoint.family.model_type} "
                "model of this config.json has"
            )
    return set(missing)


def _require_known(checkpoint: Checkpoint, parts: Parts) -> None:
    """No tensor is left over but heads for several next tokens and buffers that are computed nowadays."""
    first = checkpoint.shape.num_layers
    last = first + int(checkpoint.config.get("num_nextn_predict_layers") or 0)
    heads = tuple(f"model.layers.{layer}." for layer in range(first, last))
    known = {name for names in parts.values() for name in names}
    for name in sorted(checkpoint.files.keys() - known):
        if not name.startswith(heads) and not re.search(r"rotary_emb\.(inv_freq|\w+_cached)$", name):
            raise ConfigError(
                f"{checkpoint.folder}: tensor {name!r} is unknown to a {checkpoint.family.model_type} model of "
                "this config.json"
            )


def _fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    parts: Parts,
    owned: Collection[int] | None,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """Read every tensor into its place, in the model's order, which is layer by layer."""
    places = {name: place(checkpoint.family, name) for names in parts.values() for name in names}
    wanted = {n for n, at in places.items() if at.expert is None or owned is None or at.expert in owned}
    done = 0
    parameters = model.state_dict(keep_vars=True)
    for path, names in parts.items():
        parameter = parameters[path]
        for name in names:
            if name in wanted:
                _read(checkpoint, name, places[name].of(parameter.data))
                done += 1
                if progress is not None:
                    progress(done, len(wanted))
        parameter.data = parameter.data.to(device)


def _read(checkpoint: Checkpoint, name: str, target: Tensor) -> None:
    _, shape = checkpoint.info(name)
    if shape != tuple(target.shape):
        raise ConfigError(
            f"{checkpoint.folder}: tensor {name!r} is {shape}, config.json asks for {tuple(target.shape)}"
        )
    checkpoint.read_into(name, target)
