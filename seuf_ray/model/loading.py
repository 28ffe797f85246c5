"""From a checkpoint folder to a model in memory, tensor by tensor, without a second copy of anything.

A model is built with its weights allocated but neither initialised nor touched, which costs address space and no
memory. Then each checkpoint tensor is read straight into the slice of the (fused) parameter that it is, layer by
layer. A rank that owns some experts reads those only: pages of the others are never touched, and DeepSpeed AutoEP
clones the owned slices before it drops the fused parameters. Streaming reads one layer, and lets go of it before it
reads the next. transformers' own loading gives the same bits, but reads all experts on every rank. The only importer
of transformers.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.checkpoint.naming import place, stored_names
from seuf_ray.errors import ConfigError

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
        ConfigError: the checkpoint does not fit its config.json, as `Weights` says.
        ValueError: `owned` reaches beyond the last expert.
    """
    num_experts = checkpoint.shape.num_experts
    if owned is not None and not set(owned) <= set(range(num_experts)):
        raise ValueError(f"{owned} reaches beyond the last of {num_experts} experts")
    weights = Weights(checkpoint, dtype)
    target = torch.device("cpu" if owned is not None else device)
    stored = [path for path in weights.parts if path not in weights.tied]
    weights.fill(stored, target, owned=owned, progress=progress)
    weights.module.tie_weights(missing_keys=weights.tied, recompute_mapping=False)
    loaded: nn.Module = weights.module.to(target)
    return loaded


class Weights:
    """A checkpoint's causal LM, frozen, in evaluation mode, whose weights come from the disk and go again.

    Attributes:
        checkpoint: where they come from.
        module: the model; its weights are allocated to begin with, but not there.
        parts: parameter (or stored buffer) -> the checkpoint tensors that it is made of.
        tied: those without tensors of their own; their parts are of what they are tied to.
        bytes_read: of tensors, so far.

    Raises:
        ConfigError: the checkpoint lacks a tensor of the model, has one of another shape, or has one that neither
            the model nor a multi-token-prediction head of its family knows.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint, self.module, self.bytes_read = checkpoint, _untouched(checkpoint, dtype), 0
        self._tensors: dict[str, Tensor] = self.module.state_dict(keep_vars=True)
        parts = {p: stored_names(checkpoint.family, p, checkpoint.shape.num_experts) for p in self._tensors}
        self.tied, self.parts = _resolve_tied(checkpoint, parts, self.module.all_tied_weights_keys)
        _require_known(checkpoint, parts)
        self._shapes = {path: tensor.shape for path, tensor in self._tensors.items()}
        self._require_shapes()

    def fill(
        self,
        paths: Collection[str],
        device: torch.device | str = "cpu",
        *,
        owned: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Read these parameters, and move each to `device` as soon as it is whole; see `load`."""
        wanted = {path: [name for name in self.parts[path] if self._is_owned(name, owned)] for path in paths}
        done, total = 0, sum(map(len, wanted.values()))
        for path, names in wanted.items():
            tensor = self._memory(path)
            for name in names:
                self.checkpoint.read_into(name, place(self.checkpoint.family, name).of(tensor))
                done, self.bytes_read = done + 1, self.bytes_read + self._num_bytes(name)
                if progress is not None:
                    progress(done, total)
            self._tensors[path].data = tensor.to(device)

    def drop(self, paths: Collection[str]) -> None:
        """Give the memory of these parameters back to the system."""
        for path in paths:
            self._tensors[path].data = self._tensors[path].new_empty(0)

    @contextmanager
    def present(self, paths: Collection[str], device: torch.device | str = "cpu") -> Iterator[None]:
        """Inside, these parameters are there."""
        try:
            self.fill(paths, device)
            yield
        finally:
            self.drop(paths)

    def _memory(self, path: str) -> Tensor:
        """What was allocated for a parameter; once it was dropped, pages that go back to the system with the next drop.

        malloc would keep the smaller ones for itself, layer by layer.
        """
        tensor, shape = self._tensors[path].data, self._shapes[path]
        if tensor.shape == shape:
            return tensor
        size, flags = shape.numel() * tensor.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=tensor.dtype).view(shape)

    def _is_owned(self, name: str, owned: Collection[int] | None) -> bool:
        expert = place(self.checkpoint.family, name).expert
        return owned is None or expert is None or expert in owned

    def _num_bytes(self, name: str) -> int:
        entry = self.checkpoint.entries[name]
        return math.prod(entry.shape) * entry.torch_dtype.itemsize

    def _require_shapes(self) -> None:
        family = self.checkpoint.family
        for path, names in self.parts.items():
            for name in names:
                _, found = self.checkpoint.info(name)
                asked = tuple(place(family, name).of(self._tensors[path]).shape)
                if found != asked:
                    raise ConfigError(
                        f"{self.checkpoint.folder}: tensor {name!r} is {found}, config.json asks for {asked}"
                    )


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

    # oneDNN on a busy CPU sometimes turns a 0.3 s step into 10 s. In float32 these sizes gain nothing from it, while
    # in bfloat16 everything else is about five times as slow.
    torch.backends.mkldnn.enabled = dtype == torch.bfloat16  # type: ignore[assignment]
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


def _resolve_tied(checkpoint: Checkpoint, parts: Parts, tied: Mapping[str, str]) -> tuple[set[str], Parts]:
    """Parameters without tensors of their own because the checkpoint has those that they are tied to, and all parts.

    Args:
        parts: what each parameter would be made of if nothing were tied.
        tied: parameter -> the one that it is tied to.
    """
    missing = {path: name for path, names in parts.items() for name in names if name not in checkpoint.files}
    partners = {source: path for path, source in tied.items()} | dict(tied)
    for path, name in missing.items():
        if partners.get(path, path) in missing:
            raise ConfigError(
                f"{checkpoint.folder}: tensor {name!r} is missing, which a {checkpoint.family.model_type} "
                "model of this config.json has"
            )
    return set(missing), {**parts, **{path: parts[partners[path]] for path in missing}}


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
