"""Target experts and routers as small trainable parameters over a frozen model.

Each target expert is a pair of parameters copied from its slice of the fused weights; each target router is a
parameter too. Hooks take the rows routed to a target expert out of the frozen path (their score becomes 0 there)
and add

    score * down( act(gate(x)) * up(x) )

from the overlay. So gradients, optimizer state and all-reduce exist for the plan's tensors only, weight decay cannot
touch anything else, and the original model is one switch away: `reference()` turns the hooks off, which leaves every
bit of the original computation. Under expert parallelism the overlay is replicated while frozen experts are sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.families import PARTS
from seuf_ray.model.moe import MoEModel
from seuf_ray.model.taps import Site


class ExpertOverlay(nn.Module):
    """One expert's trainable copy: `gate_up (2F, D)`, `down (D, F)`, kept in float32."""

    def __init__(
        self, gate: Tensor, up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.cat([gate, up]).float())
        self.down = nn.Parameter(down.detach().clone().float())
        self.activation = activation

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, D) of the `tokens` (n, D) routed to this expert."""
        gate, up = F.linear(tokens, self.gate_up.to(tokens.dtype)).chunk(2, dim=-1)
        return F.linear(self.activation(gate) * up, self.down.to(tokens.dtype))


class RouterOverlay(nn.Module):
    """One router's trainable weight (E, D), kept in float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone().float())

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The weight as the gate uses it; a tensor of its own, because ZeRO 3 takes the parameter away again."""
        return self.weight.to(dtype, copy=True)


class Overlay(nn.Module):
    """The trainable part of a plan, hooked into a model.

    Args:
        model: whose slices are copied; nothing in it is changed.
        plan: target experts, and the layers whose router trains.
    """

    def __init__(self, model: MoEModel, plan: UnlearningPlan) -> None:
        super().__init__()
        self.enabled = True
        self.model_family = model.family
        self.experts = nn.ModuleDict({f"{at}_{e}": _copy_expert(model, at, e) for at, e in plan.experts})
        self.routers = nn.ModuleDict(
            {str(at): RouterOverlay(model.view(model.family.router_tensor(at))) for at in plan.routers}
        )
        self._hooks: list[RemovableHandle] = []
        self._hooked: list[Site] = []
        self._targets: dict[int, list[int]] = {}
        for layer, expert in plan.experts:
            self._targets.setdefault(layer, []).append(expert)

    def attach(self, model: MoEModel) -> None:
        """Hook into the model's sites; called once they are what will run (after DeepSpeed replaced them)."""
        for layer in sorted({*self._targets, *map(int, self.routers)}):
            site = model.sites[layer]
            taken: list[
                tuple[Tensor, Tensor, Tensor]
            ] = []  # (tokens, scores, choices) between router and block
            self._hooked.append(site)
            self._hooks += [
                site.router.register_forward_pre_hook(self._swap_router(site)),
                site.router.register_forward_hook(self._take_rows(site, taken)),
                site.block.register_forward_hook(self._add_rows(site, taken)),
            ]

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        for hook in self._hooks:
            hook.remove()
        for site in self._hooked:
            site.gate.__dict__.pop("weight", None)  # a pass that was given up half way leaves it behind
        self._hooks, self._hooked = [], []

    def trained(self) -> list[nn.Parameter]:
        """What the optimizer sees."""
        return list(self.parameters())

    def router_weights(self) -> dict[int, nn.Parameter]:
        """(E, D) of the routers that train, by layer."""
        return {int(layer): router.get_parameter("weight") for layer, router in self.routers.items()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the original, bit for bit."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors under checkpoint names, detached, on the CPU."""
        named: dict[str, Tensor] = {}
        for at, router in self.routers.items():
            assert isinstance(router, RouterOverlay)
            named[self.model_family.router_tensor(int(at))] = router.weight
        for key, expert in self.experts.items():
            layer, index = map(int, key.split("_"))
            assert isinstance(expert, ExpertOverlay)
            for part, tensor in zip(PARTS, (*expert.gate_up.chunk(2), expert.down), strict=True):
                named[self.model_family.expert_tensor(layer, index, part)] = tensor
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(named.items())
        }

    def _swap_router(self, site: Site) -> Callable[..., None]:
        """The gate sees our weight as its own attribute, which hides the frozen parameter until the router is done."""

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            site.gate.__dict__.pop("weight", None)  # a recomputation that stopped early leaves it behind
            if self.enabled and str(site.layer) in self.routers:
                dtype = site.gate.get_parameter("weight").dtype
                site.gate.__dict__["weight"] = self.routers[str(site.layer)](dtype)

        return hook

    def _take_rows(self, site: Site, taken: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
        """Zero the scores of target experts in the frozen path and remember what they were."""

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> Any:
            site.gate.__dict__.pop("weight", None)
            if not self.enabled or site.layer not in self._targets:
                return None
            scores, choices = output[site.scores_at], output[site.choices_at]
            tokens = inputs[0].reshape(-1, inputs[0].shape[-1])
            taken[:] = [(tokens, scores, choices)]
            hit = torch.isin(choices, torch.tensor(self._targets[site.layer], device=choices.device))
            kept = torch.where(hit, torch.zeros_like(scores), scores)
            return tuple(kept if i == site.scores_at else part for i, part in enumerate(output))

        return hook

    def _add_rows(self, site: Site, taken: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not taken or not self.enabled:
                return None
            total = output[0] if isinstance(output, tuple) else output
            added = total + self._overlaid(site.layer, *taken.pop()).view_as(total)
            return (added, *output[1:]) if isinstance(output, tuple) else added

        return hook

    def _overlaid(self, layer: int, tokens: Tensor, scores: Tensor, choices: Tensor) -> Tensor:
        """(N, D) contribution of this layer's target experts to every token."""
        added = torch.zeros_like(tokens)
        for index in self._targets[layer]:
            row, slot = (choices == index).nonzero(as_tuple=True)
            contribution = self.experts[f"{layer}_{index}"](tokens[row]) * scores[row, slot, None]
            added = added.index_add(0, row, contribution.to(added.dtype))
        return added


def _copy_expert(model: MoEModel, layer: int, expert: int) -> ExpertOverlay:
    gate, up, down = (model.view(model.family.expert_tensor(layer, expert, part)) for part in PARTS)
    return ExpertOverlay(gate, up, down, model.activation)
