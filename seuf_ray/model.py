"""A causal MoE language model in one process: load it, run it, tap its routers, exchange its tensors.

Since transformers 5 every family has `mlp.gate` (router) and `mlp.experts` (fused 3-D parameters); DeepSpeed AutoEP
replaces the block by one with `mlp.router`. A `Site` hides that difference, so taps and overlay do not know which of
the two they sit on. Router logits are computed from the router's input and weight: they equal the model's own, and
DeepSeek-V2 has no output for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from seuf_ray.checkpoint import Checkpoint
from seuf_ray.loading import load
from seuf_ray.loading import load_tokenizer as load_tokenizer
from seuf_ray.naming import place, view
from seuf_ray.passes import Batch, Counts, Forward, token_logps
from seuf_ray.plugins import Reads
from seuf_ray.spans import Spans

ALL = Reads()


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


@dataclass(frozen=True)
class Prefix:
    """What the layers below `layer` make of a batch: hidden (B, T, D), and their routing by layer."""

    layer: int
    hidden: Tensor
    router_logits: dict[int, Tensor]
    router_choices: dict[int, Tensor]


class RouterTaps:
    """Records each router's logits (N, E) and choices (N, K) of the last pass, by layer."""

    def __init__(self, sites: Mapping[int, Site]) -> None:
        self.logits: dict[int, Tensor] = {}
        self.choices: dict[int, Tensor] = {}
        self._hooks = []
        for site in sites.values():  # for transformers' blocks the gate is the router itself
            self._hooks.append(site.gate.register_forward_hook(self._record_logits(site)))
            self._hooks.append(site.router.register_forward_hook(self._record_choices(site)))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def clear(self) -> None:
        """Forget the last pass; a backward pass that recomputed layers has left its own records."""
        self.logits.clear()
        self.choices.clear()

    def _record_logits(self, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            self.logits[site.layer] = logits.reshape(-1, logits.shape[-1]).float()

        return hook

    def _record_choices(self, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            self.choices[site.layer] = output[site.choices_at].detach()

        return hook


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

    def attach(self, module: nn.Module) -> None:
        """Use `module` (after DeepSpeed replaced its MoE blocks) and tap its routers."""
        self.module = module
        self.sites = {layer: _site(module, layer) for layer in self.shape.moe_layers}
        self.taps = RouterTaps(self.sites)
        self.spans = Spans(module)

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
            checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        """
        self.taps.clear()
        start = prefix or Prefix(0, self.spans.embed(batch.ids), {}, {})
        last = self.spans.num_layers if reads.depth is None else max(reads.depth, start.layer)
        with _outputs_of(self.spans.layers, reads.hidden) as outputs:
            hidden = self._run(start, last, batch, checkpointing)
        router_logits, router_choices = self._routing(batch)
        logps, logits = self._head(hidden, batch, reads)
        num_tokens, num_sequences, num_routed = counts or batch_counts(batch)
        return Forward(
            logps=logps,
            mask=batch.counted[:, 1:],
            router_logits=start.router_logits | router_logits,
            router_choices=start.router_choices | router_choices,
            hidden=dict(outputs),
            real=batch.routed,
            logits=logits,
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
        with _stopping_after(self.sites[last].router):
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

    def _head(self, hidden: Tensor, batch: Batch, reads: Reads) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (B, T-1), and logits if they are read.

        NaN where the pass was cut short, so that a loss which reads it cannot pass silently.
        """
        if reads.depth is not None:
            return torch.full_like(batch.ids[:, 1:], torch.nan, dtype=torch.float32), None
        if not reads.logits:
            return token_logps(self.spans.head(hidden), batch.ids), None
        logits = self.spans.head(hidden)
        return token_logps(logits, batch.ids), logits[:, :-1]

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
        start from it on every rank.

        Raises:
            KeyError: the model has no such tensor.
        """
        shared = view(self.module, self.family, name)
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


class _Enough(Exception):
    """Raised inside a pass that needs to go no further."""


@contextmanager
def _stopping_after(module: nn.Module) -> Iterator[None]:
    """Inside, a pass ends once `module` (and what taps it) is done; the rest of it is not computed."""

    def stop(*_: Any) -> None:
        raise _Enough

    hook = module.register_forward_hook(stop)
    try:
        with suppress(_Enough):
            yield
    finally:
        hook.remove()


@contextmanager
def _outputs_of(layers: nn.ModuleList, wanted: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, collects the output (B, T, D) of the `wanted` layers."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [layers[layer].register_forward_hook(keep(layer)) for layer in wanted]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def batch_counts(batch: Batch) -> Counts:
    """Counted tokens, rows and real tokens of one batch."""
    rows = 0.0 if batch.is_filler else float(len(batch.ids))
    return float(batch.counted[:, 1:].sum()), rows, float(batch.routed.sum())


def _site(module: nn.Module, layer: int) -> Site:
    block = module.get_submodule(f"model.layers.{layer}.mlp")
    if hasattr(block, "router"):  # DeepSpeed AutoEP
        router = block.get_submodule("router")
        return Site(layer, block, router, router.get_submodule("gate"), scores_at=0, choices_at=1)
    router = block.get_submodule("gate")
    return Site(layer, block, router, router, scores_at=1, choices_at=2)
