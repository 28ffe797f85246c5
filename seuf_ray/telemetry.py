"""What a training step does to the routing of its own forget batch, from what its passes leave behind anyway.

    step/overlap_top1/LAYER       share of real tokens whose first choice is the original's
    step/overlap_topk/LAYER       share of the original's K choices that are still made
    step/kl/LAYER                 KL(p_original || p_current), nats per token
    step/target_tokens/LAYER      share of real tokens that a target expert of the layer is chosen for
    step/target_tokens_ref/LAYER  the same share under the original router
    step/anchor_grad_norm         norm of the anchor term's own gradient with respect to all trained routers

Each is the mean over the tokens (the norm: over the steps) looked at since the last record. The small evaluation asks
fixed probes what has become of the routing; these figures are about the very tokens that were trained on, so a
batch is seen before its own step. Layers below the first target cannot change and are left out. Overlaps, KL and
`_ref` need the original's pass: they are there as deep as a loss reads it (the KL anchor: up to the last trained
router), with `telemetry.reference` for every layer, without either not at all.

Sums stay on the device and are added over ranks once per record. Nothing random is drawn and nothing trained is
touched: tensors are the same bits with telemetry and without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seuf_ray import routing
from seuf_ray.config import TelemetryConfig
from seuf_ray.engine import Engine
from seuf_ray.evaluation import grid_sum
from seuf_ray.passes import Forward, Targets
from seuf_ray.plugins import Reads


class Telemetry:
    """Watches one run's steps: `begin`, `observe` each micro-batch, `end`, and `collect` for a record.

    A step that is given up before `end` leaves no trace.
    """

    def __init__(self, engine: Engine, targets: Targets, config: TelemetryConfig) -> None:
        self.engine, self.targets, self.config = engine, targets, config
        self._experts: dict[int, Tensor] = {}  # layer -> its target experts, on the device
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # of each name, over the tokens looked at since the last record
        self._tokens = 0
        self._norms: list[Tensor] = []
        self.begin(0)

    def begin(self, step: int) -> None:
        """Step number `step` comes next."""
        self._looks = _is_due(step, self.config.every)
        self._differentiates = _is_due(step, self.config.anchor_gradient_every)
        self._pending: list[tuple[Tensor, int]] = []  # sums of each figure, tokens
        self._gradient: Tensor | None = None

    def observe(self, passes: Mapping[str, object], anchor: Mapping[str, Tensor]) -> None:
        """One micro-batch of the step, before its backward pass.

        Args:
            passes: `forget`, and `forget_ref` if it ran.
            anchor: the anchor's terms.
        """
        if self._differentiates and anchor:
            gradient = self.engine.router_gradient(torch.stack(list(anchor.values())).sum())
            self._gradient = gradient if self._gradient is None else self._gradient + gradient
        forget, reference = passes.get("forget"), passes.get("forget_ref")
        if self._looks and isinstance(forget, Forward):
            figures = self._figures(forget, reference if isinstance(reference, Forward) else None)
            if figures:
                self._names = tuple(figures)
                values = torch.stack(list(figures.values()))  # (figures, N)
                self._pending.append((grid_sum(values), values.shape[1]))

    def end(self) -> None:
        """The step is taken: what was observed counts."""
        for sums, tokens in self._pending:
            self._sums = sums if self._sums is None else self._sums + sums
            self._tokens += tokens
        if self._gradient is not None and self._gradient.numel():
            self._norms.append((self.engine.total(self._gradient) / self.engine.world_size).norm())

    def collect(self) -> dict[str, float]:
        """Means over all ranks since the last call, which every rank makes."""
        found: dict[str, float] = {}
        if self._sums is not None:
            local = torch.cat([self._sums, self._sums.new_tensor([self._tokens])])
            *sums, tokens = self.engine.total(local).tolist()
            found = {name: value / tokens for name, value in zip(self._names, sums, strict=True)}
        if self._norms:
            found["step/anchor_grad_norm"] = float(torch.stack(self._norms).mean())
        self._sums, self._tokens, self._norms = None, 0, []
        return found

    @torch.no_grad()
    def _figures(self, forget: Forward, reference: Forward | None) -> dict[str, Tensor]:
        """(N,) values of each figure."""
        found: dict[str, Tensor] = {}
        for layer in self.targets.layers_from_first:
            if layer not in forget.router_logits:
                continue
            now = forget.router_logits[layer], forget.router_choices[layer]
            found |= self._on_targets("target_tokens", layer, now[1])
            if reference is None or layer not in reference.router_logits:
                continue
            before = reference.router_logits[layer], reference.router_choices[layer]
            moved = routing.drift(*before, *now, self.targets.scoring)
            found |= {f"step/{name}/{layer}": values for name, values in moved.items()}
            found |= self._on_targets("target_tokens_ref", layer, before[1])
        return found

    def _on_targets(self, name: str, layer: int, choices: Tensor) -> dict[str, Tensor]:
        if not (experts := self.targets.experts_of(layer)):
            return {}
        if layer not in self._experts:
            self._experts[layer] = torch.tensor(experts, device=choices.device)
        return {f"step/{name}/{layer}": torch.isin(choices, self._experts[layer]).any(dim=1).float()}


def with_reference(reads: Mapping[str, Reads], targets: Targets, config: TelemetryConfig) -> dict[str, Reads]:
    """What is read of a step's passes, with the original's deep enough for `telemetry.reference`."""
    if not (config.reference and config.every):
        return dict(reads)
    wanted = Reads(depth=max(targets.moe_layers) + 1)
    return {**reads, "forget_ref": reads.get("forget_ref", wanted) | wanted}


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
