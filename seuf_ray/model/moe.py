"""A causal MoE language model in one process: load it, run it, tap its routers, exchange its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.checkpoint.naming import place, view
from seuf_ray.model.loading import load
from seuf_ray.model.loading import load_tokenizer as load_tokenizer
from seuf_ray.model.spans import Spans
from seuf_ray.model.taps import RouterTaps, inputs_of, outputs_of, site_of, stopping_after
from seuf_ray.passes import Batch, Counts, Forward, chosen_logps, token_logps
from seuf_ray.plugins import Reads

ALL = Reads()
HEAD_TOKENS = 256  # whose logits exist at once where memory is dear


@dataclass(frozen=True)
class Prefix:
    """What the layers below `layer` make of a batch: hidden (B, T, D), and their routing by layer."""

    layer: int
    hidden: Tensor
    router_logits: dict[int, Tensor]
    router_choices: dict[int, Tensor]


class MoEModel:
    """A checkpoint in memory, frozen, in evaluation mode.

    Args:
        checkpoint: which.
        dtype: of all weights while computing.
        device: where.
        owned: the experts of every layer to read, where expert parallelism leaves the others to other ranks; the
            model stays on the CPU until DeepSpeed has taken them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        owned: range | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.family, self.shape = checkpoint.family, checkpoint.shape
        self.dtype, self.owned = dtype, owned
        self.attach(load(checkpoint, dtype, device, owned=owned))
        experts: Any = next(iter(self.sites.values())).block.get_submodule("experts")
        self.activation: Callable[[Tensor], Tensor] = experts.act_fn  # AutoEP's blocks do not have it

    def attach(self, module: nn.Module) -> None:
        """Use `module` (after DeepSpeed replaced its MoE blocks) and tap its routers."""
        self.module = module
        self.sites = {layer: site_of(module, layer) for layer in self.shape.moe_layers}
        self.taps = RouterTaps(self.sites)
        self.spans = Spans(module)
        self.is_replaced = any(site.gate is not site.router for site in self.sites.values())

    def detach(self) -> None:
        """Let go of the MoE blocks until `attach`: what DeepSpeed replaces would stay in memory with us otherwise."""
        self.taps.remove()
        self.sites = {}

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def forward(
        self,
        batch: Batch,
        counts: Counts | None = None,
        *,
        reads: Reads = ALL,
        prefix: Prefix | None = None,
        checkpointing: bool = False,
    ) -> Forward:
        """Run `batch` through the model, as far as `reads` needs it.

        Args:
            counts: of the whole batch per rank; default: this batch's own.
            reads: what is wanted besides routing.
            prefix: where to go on from, if the lower layers are known already.
            checkpointing: recompute each layer, and the head, in the backward pass instead of keeping activations.
        """
        self.taps.clear()
        start = prefix or Prefix(0, self.spans.embed(batch.ids), {}, {})
        last = self.spans.num_layers if reads.depth is None else max(reads.depth, start.layer)
        tapped = inputs_of(self.sites, reads.router_inputs)
        with outputs_of(self.spans.layers, reads.hidden) as outputs, tapped as inputs:
            hidden = self._run(start, last, batch, checkpointing)
        router_logits, router_choices = self._routing(batch)
        logps, logits = self._head(hidden, batch, reads, checkpointing)
        num_tokens, num_sequences, num_routed = counts or batch_counts(batch)
        return Forward(
            logps=logps,
            mask=batch.counted[:, 1:],
            router_logits=start.router_logits | router_logits,
            router_choices=start.router_choices | router_choices,
            hidden=dict(outputs),
            router_inputs={layer: seen[batch.routed.flatten()] for layer, seen in inputs.items()},
            real=batch.routed,
            logits=logits,
            tokens=batch.ids[:, 1:],
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            num_routed=num_routed,
        )

    @torch.no_grad()
    def prefix(self, batch: Batch, layer: int) -> Prefix:
        """What the layers below `layer` make of a batch."""
        self.taps.clear()
        hidden = self.spans.run(0, layer, self.spans.embed(batch.ids), batch.mask, batch.positions)
        return Prefix(layer, hidden, *self._routing(batch))

    def route(self, batch: Batch) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Router logits (N, E) and choices (N, K) by layer; nothing after the last router is computed."""
        self.taps.clear()
        last = max(self.shape.moe_layers)
        with stopping_after(self.sites[last].router):
            self.spans.run(0, last + 1, self.spans.embed(batch.ids), batch.mask, batch.positions)
        return self._routing(batch)

    def _run(self, start: Prefix, last: int, batch: Batch, checkpointing: bool) -> Tensor:
        hidden, mask, positions = start.hidden, batch.mask, batch.positions
        if not checkpointing:
            return self.spans.run(start.layer, last, hidden, mask, positions)
        for layer in range(start.layer, last):
            # Not reentrant: only so do router logits, which leave the layer through a tap, keep their gradient.
            run = functools.partial(self.spans.run, layer, layer + 1)
            hidden = recomputed(run, hidden, mask, positions, use_reentrant=False)
        return hidden

    def _head(
        self, hidden: Tensor, batch: Batch, reads: Reads, checkpointing: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (B, T-1), and logits if they are read.

        NaN where the pass was cut short, so that a loss which reads it cannot pass silently.
        """
        if reads.depth is not None:
            return torch.full_like(batch.ids[:, 1:], torch.nan, dtype=torch.float32), None
        if checkpointing and not reads.logits:
            return self._frugal_logps(hidden[:, :-1], batch.ids[:, 1:]), None
        logits = self.spans.head(hidden)
        return token_logps(logits, batch.ids), logits[:, :-1] if reads.logits else None

    def _frugal_logps(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(B, T-1), with the logits of few tokens in memory at any time: a large vocabulary's outweigh a layer."""
        flat = torch.split(hidden.flatten(0, 1), HEAD_TOKENS), torch.split(tokens.flatten(), HEAD_TOKENS)
        parts = zip(*flat, strict=True)
        found = [recomputed(self._chosen, part, wanted, use_reentrant=False) for part, wanted in parts]
        return torch.cat(found).view_as(tokens)

    def _chosen(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return chosen_logps(self.spans.head(hidden), tokens)

    def _routing(self, batch: Batch) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """What the taps saw of real tokens: padding is routed too, and must never count."""
        real = batch.routed.flatten()
        logits = {layer: seen[real] for layer, seen in sorted(self.taps.logits.items())}
        choices = {layer: seen[real] for layer, seen in sorted(self.taps.choices.items())}
        self.taps.clear()
        return logits, choices

    def view(self, name: str) -> Tensor:
        """The part of a parameter that the checkpoint calls `name`, sharing its memory.

        An expert that is not owned has no memory here: it comes as a copy from the checkpoint, so an overlay can
        start from it on every rank. So does all that DeepSpeed has put elsewhere.

        Raises:
            KeyError: the model has no such tensor.
        """
        try:
            shared = view(self.module, self.family, name)
        except KeyError:
            if not self.is_replaced or name not in self.checkpoint.files:
                raise
            return self.checkpoint.read(name).to(self.device, self.dtype)
        return shared if self._holds(name) else self.checkpoint.read(name).to(shared)

    def _holds(self, name: str) -> bool:
        expert = place(self.family, name).expert
        return self.owned is None or expert is None or expert in self.owned

    def exchange(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy `tensors` (checkpoint names) into the model; returns what they replaced, to exchange back.

        Experts that are not owned stay as they are: nothing here computes with them.
        """
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
                view(self.module, self.family, name)
            except KeyError:
                continue
            if self._holds(name):
                found.append(name)
        return sorted(found)


def batch_counts(batch: Batch) -> Counts:
    """Counted tokens, rows with such a token, and real tokens of one batch."""
    counted = batch.counted[:, 1:]
    return float(counted.sum()), float(counted.any(dim=1).sum()), float(batch.routed.sum())
