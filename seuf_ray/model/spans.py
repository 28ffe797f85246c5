"""Spans of decoder layers: `span(first, last)` runs layers [first, last) on hidden states.

The Hugging Face backbone itself with its `layers` list narrowed, fed `inputs_embeds`, so masks, positions and every
family's peculiarities stay the library's. Composition is bit-exact: layers [0, n) are [0, k) then [k, n). From this
come prefix caching (layers below the lowest target never change), truncation (a loss that reads layer l runs nothing
above it, and no head), and streaming one layer at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Spans:
    """The spans of one causal LM; narrowed backbones share its layers and are made once.

    Args:
        module: with `.model` (embed_tokens, layers, norm) and `.lm_head`, as transformers builds causal LMs.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        layers: Any = module.get_submodule("model.layers")
        self.layers, self.num_layers = layers, len(layers)
        self._made: dict[tuple[int, int], nn.Module] = {}

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T, D) embeddings of `ids` (B, T)."""
        hidden: Tensor = self.module.get_submodule("model.embed_tokens")(ids)
        return hidden

    def run(
        self, first: int, last: int, hidden: Tensor, mask: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) after layers [first, last), with the final norm if `last` is the end of the model.

        Args:
            hidden: (B, T, D) input of layer `first`.
            mask: (B, T) True at real tokens, or (B, 1, T, T) True at what each token may attend to.
            positions: (B, T) of each token; default: its place in the row.
        """
        if first == last:
            return hidden
        output = self._narrowed(first, last)(
            inputs_embeds=hidden,
            attention_mask=mask.long() if mask.dim() == 2 else mask,
            position_ids=positions,
            use_cache=False,
        )
        result: Tensor = output.last_hidden_state
        return result

    def head(self, hidden: Tensor) -> Tensor:
        """(B, T, V) logits of normed hidden states."""
        logits: Tensor = self.module.get_submodule("lm_head")(hidden)
        return logits

    def _narrowed(self, first: int, last: int) -> nn.Module:
        if (first, last) not in self._made:
            self._made[first, last] = _narrow(self.module.get_submodule("model"), first, last)
        return self._made[first, last]


def _narrow(backbone: nn.Module, first: int, last: int) -> nn.Module:
    layers: Any = backbone.get_submodule("layers")
    if (first, last) == (0, len(layers)):
        return backbone
    narrowed = copy.copy(backbone)
    narrowed._modules = dict(backbone._modules)
    narrowed._modules["layers"] = nn.ModuleList(layers[first:last])
    if last < len(layers):
        narrowed._modules["norm"] = nn.Identity()
    config: Any = copy.copy(backbone.config)
    config.num_hidden_layers = last - first
    if getattr(config, "layer_types", None):  # read by position within the span
        config.layer_types = list(config.layer_types[first:last])
    narrowed.config = config
    return narrowed


class ConstantCache:
    """Tensors that a batch always leads to, in memory up to `max_bytes`, then in files under `spill` (if given).

    What the frozen part of a model computes for a batch does not change over steps, epochs or trials: hidden states
    below the lowest target, and everything of the original model.

    Args:
        max_bytes: in memory, on whatever device the tensors are.
        spill: folder of this process for what does not fit; made when it is needed.
        agree: makes one size of every rank's (their mean). A miss runs collective calls, so ranks must keep and forget
            the same batches.
    """

    def __init__(
        self, max_bytes: int, spill: Path | None = None, agree: Callable[[int], int] = lambda size: size
    ) -> None:
        self.max_bytes, self.spill, self.agree = max_bytes, spill, agree
        self.used = self.hits = self.misses = 0
        self._memory: dict[Hashable, dict[str, Tensor]] = {}
        self._sizes: dict[Hashable, int] = {}  # of those in memory
        self._files: dict[Hashable, Path] = {}
        self._written = 0
        self._stale: dict[
            Hashable, None
        ] = {}  # in memory, and not asked for in this generation; oldest first

    def renew(self) -> None:
        """Another trial begins: what it does not ask for gives way to what it computes.

        Within a trial what came first stays: batches come again in turn, so making room for each would keep none.
        """
        for key in [key for key in self._files if key in self._stale]:
            self._files.pop(key).unlink(missing_ok=True)
        self._stale = dict.fromkeys([*self._memory, *self._files])

    def get(self, key: Hashable, device: torch.device) -> dict[str, Tensor] | None:
        """What `put` stored under `key`, on `device`."""
        found = self._memory.get(key)
        self._stale.pop(key, None)
        if found is None and key in self._files:
            found = load_file(self._files[key])
        self.hits += found is not None
        self.misses += found is None
        return None if found is None else {name: tensor.to(device) for name, tensor in found.items()}

    def put(self, key: Hashable, tensors: dict[str, Tensor]) -> None:
        """Keep `tensors` if there is room for them."""
        size = self.agree(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        self._make_room(size)
        if self.used + size <= self.max_bytes:
            self.used += size
            self._sizes[key] = size
            self._memory[key] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        elif self.spill is not None:
            self._write(key, tensors)

    def _make_room(self, size: int) -> None:
        """Forget what earlier trials left, oldest first, as far as `size` needs it; nothing where it is not enough."""
        old = [key for key in self._stale if key in self._memory]
        if self.used + size - sum(self._sizes[key] for key in old) > self.max_bytes:
            return
        for key in old:
            if self.used + size <= self.max_bytes:
                return
            self.used -= self._sizes.pop(key)
            del self._memory[key], self._stale[key]

    def _write(self, key: Hashable, tensors: dict[str, Tensor]) -> None:
        assert self.spill is not None
        self.spill.mkdir(parents=True, exist_ok=True)
        path = self.spill / f"{self._written}.safetensors"
        self._written += 1
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        self._files[key] = path
