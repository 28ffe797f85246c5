"""Where numbers stopped being finite: the layer whose routing shows it first, the tensors whose gradients do.

Sums over ranks decide, so that all of them tell the same; an ordinary step pays for one look at each gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from seuf_ray.passes import Forward

Total = Callable[[Tensor], Tensor]


def where_passes_broke(passes: Mapping[str, object], total: Total) -> str:
    """The first layer whose router logits are not finite in some pass, in words.

    Args:
        passes: what a loss was given; all ranks pass the same names and layers.
        total: sums a tensor over all ranks.
    """
    routing = {
        (layer, name): logits
        for name, forward in passes.items()
        if isinstance(forward, Forward)
        for layer, logits in forward.router_logits.items()
    }
    if not routing:
        return "no router was looked at"
    keys = sorted(routing)
    bad = torch.stack([(~torch.isfinite(routing[key])).sum().double() for key in keys])
    for (layer, name), count in zip(keys, total(bad).tolist(), strict=True):
        if count:
            return f"first seen at the router of layer {layer} in the {name} pass"
    return (
        f"the routing up to layer {keys[-1][0]} is finite: it arose after that router, or in the loss itself"
    )


class GradientWatch:
    """Which parameters were ever given a gradient that is not finite: it ends a run, so once is enough.

    A hook looks when the gradient is made: later ZeRO has cut it in pieces, and DeepSpeed thrown it away.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names = list(parameters)
        self._bad: dict[int, Tensor] = {}
        self._hooks = [
            parameter.register_hook(self._look(at))  # type: ignore[no-untyped-call]
            for at, parameter in enumerate(parameters.values())
        ]

    def _look(self, at: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            bad = (~torch.isfinite(gradient)).any()
            self._bad[at] = self._bad[at] | bad if at in self._bad else bad

        return hook

    def found(self, total: Total) -> list[str]:
        """The names, of what any rank saw."""
        seen = torch.tensor([float(self._bad.get(at, False)) for at in range(len(self.names))]).double()
        return [name for name, count in zip(self.names, total(seen).tolist(), strict=True) if count]

    def remove(self) -> None:
        """Look no more."""
        for hook in self._hooks:
            hook.remove()


def in_words(names: Sequence[str], most: int = 3) -> str:
    """Names of trained parameters as people say them: `experts.4_5.down` is `layer 4 expert 5 down`."""
    said = [re.sub(r"^experts\.(\d+)_(\d+)\.", r"layer \1 expert \2 ", name) for name in names]
    said = [re.sub(r"^routers\.(\d+)\..*", r"layer \1 router", name) for name in said]
    more = f", and {len(said) - most} more" if len(said) > most else ""
    return ", ".join(said[:most]) + more
