"""Where a model is looked at from outside: its MoE layers, their routers, the outputs of layers.

Since transformers 5 every family has `mlp.gate` (router) and `mlp.experts` (fused 3-D parameters); DeepSpeed AutoEP
replaces the block by one with `mlp.router`. A `Site` hides that difference, so taps and overlay do not know which of
the two they sit on. Router logits are computed from the router's input and weight: they equal the model's own, and
DeepSeek-V2 has no output for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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


def site_of(module: nn.Module, layer: int) -> Site:
    """The MoE layer `layer` of a causal LM, as transformers built it or as AutoEP replaced it."""
    block = module.get_submodule(f"model.layers.{layer}.mlp")
    if hasattr(block, "router"):  # DeepSpeed AutoEP
        router = block.get_submodule("router")
        return Site(layer, block, router, router.get_submodule("gate"), scores_at=0, choices_at=1)
    router = block.get_submodule("gate")
    return Site(layer, block, router, router, scores_at=1, choices_at=2)


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


class _Enough(Exception):
    """Raised inside a pass that needs to go no further."""


@contextmanager
def stopping_after(module: nn.Module) -> Iterator[None]:
    """Inside, a pass ends once `module` (and what taps it) is done; the rest of it is not computed."""

    def stop(*_: Any) -> None:
        raise _Enough

    hook = module.register_forward_hook(stop)
    try:
        with suppress(_Enough):
            yield
    finally:
        hook.remove()


def outputs_of(layers: nn.ModuleList, wanted: Collection[int]) -> AbstractContextManager[dict[int, Tensor]]:
    """Inside, collects the output (B, T, D) of the `wanted` layers."""
    return _recording({at: layers[at] for at in wanted}, lambda _, o: o[0] if isinstance(o, tuple) else o)


def inputs_of(
    sites: Mapping[int, Site], wanted: Collection[int]
) -> AbstractContextManager[dict[int, Tensor]]:
    """Inside, collects the inputs (B * T, D) of the routers of the `wanted` layers."""
    return _recording({at: sites[at].gate for at in wanted}, lambda inputs, _: inputs[0].flatten(0, -2))


@contextmanager
def _recording(
    modules: Mapping[int, nn.Module], what: Callable[[Any, Any], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """Inside, collects `what(inputs, output)` of each module that runs."""
    found: dict[int, Tensor] = {}

    def keep(at: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            found[at] = what(inputs, output)

        return hook

    hooks = [module.register_forward_hook(keep(at)) for at, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
