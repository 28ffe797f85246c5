"""A causal MoE language model in one process: load it, run it, tap its routers, exchange its tensors.

The only importer of transformers. Since transformers 5 every family has `mlp.gate` (router) and `mlp.experts`
(fused 3-D parameters); DeepSpeed AutoEP replaces the block by one with `mlp.router`. A `Site` hides that
difference, so taps and overlay do not know which of the two they sit on. Router logits are computed from the
router's input and weight: they equal the model's own, and DeepSeek-V2 has no output for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seuf_ray.checkpoint import Checkpoint
from seuf_ray.families import Part
from seuf_ray.passes import Batch, Forward, token_logps


@dataclass(frozen=True)
class Site:
    """One MoE layer of a model.

    Attributes:
        layer: its index.
        block: the module whose output is the layer's MoE output (B, T, D).
        router: called with the tokens; its output tuple holds scores (N, K) and choices (N, K).
        gate: the module whose `weight` (E, D) is the router's.
        scores_at, choices_at: where in the router's output they are.
    """

    layer: int
    block: nn.Module
    router: nn.Module
    gate: nn.Module
    scores_at: int
    choices_at: int


class RouterTaps:
    """Records each router's logits (N, E) and choices (N, K) of the last pass, by layer."""

    def __init__(self, sites: Mapping[int, Site]) -> None:
        self.logits: dict[int, Tensor] = {}
        self.choices: dict[int, Tensor] = {}
        for site in sites.values():
            site.router.register_forward_hook(self._record(site))

    def _record(self, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].reshape(-1, inputs[0].shape[-1])
            self.logits[site.layer] = F.linear(tokens.float(), site.gate.weight.float())
            self.choices[site.layer] = output[site.choices_at].detach()

        return hook


class MoEModel:
    """A checkpoint in memory, frozen, in evaluation mode.

    Args:
        checkpoint: which.
        dtype: of all weights while computing.
        device: where.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.family, self.shape = checkpoint.family, checkpoint.shape
        self.module = _load(checkpoint, dtype).to(device)
        self.module.requires_grad_(False).eval()
        self.attach(self.module)

    def attach(self, module: nn.Module) -> None:
        """Use `module` (after DeepSpeed replaced its MoE blocks) and tap its routers."""
        self.module = module
        self.sites = {layer: _site(module, layer) for layer in self.shape.moe_layers}
        self.taps = RouterTaps(self.sites)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def forward(self, batch: Batch, counts: tuple[float, float, float] | None = None) -> Forward:
        """Run `batch` through the whole model.

        Args:
            counts: num_tokens, num_sequences and num_routed of the whole batch per rank; default: this batch's own.
        """
        logits = self._run(self.module, batch).logits
        num_tokens, num_sequences, num_routed = counts or batch_counts(batch)
        return Forward(
            logps=token_logps(logits, batch.ids),
            mask=batch.counted[:, 1:],
            **self._routing(batch),
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            num_routed=num_routed,
        )

    def route(self, batch: Batch) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Router logits (N, E) and choices (N, K) by layer, without the language-model head."""
        self._run(self.module.model, batch)
        routing = self._routing(batch)
        return routing["router_logits"], routing["router_choices"]

    def _run(self, module: nn.Module, batch: Batch) -> Any:
        # Right padding cannot reach real tokens through a causal mask, so an all-real batch needs no mask at all.
        return module(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)

    def _routing(self, batch: Batch) -> dict[str, dict[int, Tensor]]:
        """Only real tokens: padding is routed too, and must never count."""
        real = batch.routed.flatten()
        logits = {layer: self.taps.logits[layer][real] for layer in self.shape.moe_layers}
        choices = {layer: self.taps.choices[layer][real] for layer in self.shape.moe_layers}
        self.taps.logits.clear()
        self.taps.choices.clear()
        return {"router_logits": logits, "router_choices": choices}

    def view(self, name: str) -> Tensor:
        """The part of a parameter that the checkpoint calls `name`, sharing its memory.

        Raises:
            KeyError: the model has no such tensor.
        """
        expert = self.family.parse_expert(name)
        if expert is not None:
            return expert_view(self.module, *expert)
        path = name.replace(f".{self.family.block}.", ".mlp.")
        try:
            return self.module.get_parameter(path).data
        except AttributeError:
            raise KeyError(f"{name}: the model has no such tensor") from None

    def exchange(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy `tensors` (checkpoint names) into the model; returns what they replaced, to exchange back."""
        replaced = {}
        for name, tensor in tensors.items():
            view = self.view(name)
            replaced[name] = view.clone()
            view.copy_(tensor)
        return replaced

    def tensor_names(self) -> list[str]:
        """Checkpoint names of every parameter that the model holds (not buffers, not multi-token heads)."""
        found = []
        for name in self.checkpoint.files:
            try:
                self.view(name)
            except (KeyError, IndexError):
                continue
            found.append(name)
        return sorted(found)


def batch_counts(batch: Batch) -> tuple[float, float, float]:
    """Counted tokens, rows and real tokens of one batch."""
    rows = 0.0 if batch.is_filler else float(len(batch.ids))
    return float(batch.counted[:, 1:].sum()), rows, float(batch.routed.sum())


def expert_view(module: nn.Module, layer: int, expert: int, part: Part) -> Tensor:
    """One projection of one expert inside the fused parameters `gate_up_proj (E, 2F, D)`, `down_proj (E, D, F)`."""
    experts = module.get_submodule(f"model.layers.{layer}.mlp.experts")
    if part == "down":
        return experts.get_parameter("down_proj").data[expert]
    gate, up = experts.get_parameter("gate_up_proj").data[expert].chunk(2)
    return gate if part == "gate" else up


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's fast tokenizer; remote code stays off."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    # oneDNN on a busy CPU sometimes turns a 0.3 s step into 10 s; these sizes gain nothing from it.
    torch.backends.mkldnn.enabled = False
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        experts_implementation="grouped_mm",
    )
    return model


def _site(module: nn.Module, layer: int) -> Site:
    block = module.get_submodule(f"model.layers.{layer}.mlp")
    if hasattr(block, "router"):  # DeepSpeed AutoEP
        return Site(layer, block, block.router, block.router.gate, scores_at=0, choices_at=1)
    return Site(layer, block, block.gate, block.gate, scores_at=1, choices_at=2)
