"""Baselines that train parameters where they lie: everything, all experts, the shared experts.

The original of what trains is kept on the CPU, and exchanged in for reference passes. Fused expert tensors train whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from seuf_ray.checkpoint.naming import place
from seuf_ray.model.moe import MoEModel


class InPlace(nn.Module):
    """The trainable part of a plan whose tensors train in the model itself.

    Args:
        model: whose parameters will change.
        names: checkpoint names of the tensors that train; empty: all.
    """

    def __init__(self, model: MoEModel, names: Sequence[str]) -> None:
        super().__init__()
        self._model = [model]  # in a list: it is not a submodule of ours
        self._original = {
            name: model.view(name).to("cpu", copy=True) for name in names or model.tensor_names()
        }
        paths = {place(model.family, name).path for name in self._original}
        self._paths = sorted(paths & {path for path, _ in model.module.named_parameters()})
        for path in self._paths:
            model.module.get_parameter(path).requires_grad_(True)

    def attach(self, model: MoEModel) -> None:
        """Nothing to hook."""

    def detach(self) -> None:
        """Put the original values back, bit for bit, and freeze the parameters again."""
        self._model[0].exchange(self._original)
        for parameter in self.trained():
            parameter.requires_grad_(False)
            parameter.grad = None

    def trained(self) -> list[nn.Parameter]:
        """What the optimizer sees; asked for anew each time, as DeepSpeed may replace modules."""
        return [self._model[0].module.get_parameter(path) for path in self._paths]

    def router_weights(self) -> dict[int, nn.Parameter]:
        """(E, D) of the routers that train, by layer."""
        gates = {layer: site.gate.get_parameter("weight") for layer, site in self._model[0].sites.items()}
        return {layer: weight for layer, weight in gates.items() if weight.requires_grad}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the original; use it before the training pass of a step, never within its graph."""
        current = self._model[0].exchange(self._original)
        try:
            yield
        finally:
            self._model[0].exchange(current)

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors under checkpoint names, detached, on the CPU."""
        return {name: self._model[0].view(name).to("cpu", copy=True).contiguous() for name in self._original}
