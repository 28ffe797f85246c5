"""The LoRA baseline: low-rank adapters of `peft` on attention and expert projections.

    W' = W + (alpha / r) B A,   A (r, in), B (out, r);   fused experts (E, out, in) get one pair for each expert

The patch holds the merged W' of every adapted tensor, as its users expect checkpoint tensors. peft's wrapper of fused
parameters computes all of W' in every pass, which is most of what the baseline costs.
Source: LoRA (arXiv 2106.09685); peft's `target_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from seuf_ray.checkpoint.naming import place, stored_names
from seuf_ray.errors import ConfigError
from seuf_ray.model.moe import MoEModel


class LowRank(nn.Module):
    """The adapters of a plan, injected into a model.

    Args:
        model: gets the adapters; its own weights stay as they are.
        names: checkpoint names of the tensors that are adapted.
        rank, alpha: r and alpha of the formula.
        seed: of the adapters' first values (A random, B zero).

    Raises:
        ConfigError: peft is not installed.
    """

    def __init__(self, model: MoEModel, names: Sequence[str], rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self._model = [model]  # in a list: it is not a submodule of ours
        self._frozen = {name: model.view(name) for name in names}  # the modules get other names now
        paths = sorted({place(model.family, name).path for name in names})
        self._modules_before = {module: dict(module._modules) for module in model.module.modules()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _inject(model.module, paths, rank, alpha)
        self._adapted = dict(_adapted(model.module))
        assert sorted(self._adapted) == paths, "peft adapts what it was asked to"

    def attach(self, model: MoEModel) -> None:
        """Nothing to hook."""

    def detach(self) -> None:
        """Take peft's wrappers out again; what they wrap was never changed."""
        for module, children in self._modules_before.items():
            module._modules.update(children)
        self._model[0].module.__dict__.pop(
            "peft_config", None
        )  # of these adapters; others would be added to them

    def trained(self) -> list[nn.Parameter]:
        """What the optimizer sees."""
        return [parameter for parameter in self._model[0].module.parameters() if parameter.requires_grad]

    def router_weights(self) -> dict[int, nn.Parameter]:
        """None: routers are not adapted."""
        return {}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the adapters are off and the model is the original, bit for bit."""
        for layer in self._adapted.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapted.values():
                layer.enable_adapters(True)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The merged tensors under checkpoint names, on the CPU."""
        model, found = self._model[0], {}
        for path, layer in self._adapted.items():
            delta = layer.get_delta_weight("default")
            for name in stored_names(model.family, path, model.shape.num_experts):
                frozen = self._frozen[name]
                merged = frozen.float() + place(model.family, name).of(delta).float()
                found[name] = merged.to("cpu", frozen.dtype, copy=True).contiguous()
        return found


def require_peft() -> None:
    """Raises ConfigError where peft is not installed; it is not imported for that."""
    if find_spec("peft") is None:
        raise ConfigError("targets.scope = 'lora' needs the extra 'lora': pip install 'seuf-ray[lora]'")


def _inject(module: nn.Module, paths: Sequence[str], rank: int, alpha: float) -> None:
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    linear = [path.removesuffix(".weight") for path in paths if path.endswith(".weight")]
    fused = [path for path in paths if not path.endswith(".weight")]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear, target_parameters=fused or None)
    inject_adapter_in_model(config, module)


def _adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path of the adapted parameter, peft's layer); wrappers of several parameters of a module are nested."""
    from peft.tuners.lora import LoraLayer

    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            path = name.replace(".base_layer", "")
            yield f"{path}.{getattr(layer, 'parameter_name', 'weight')}", layer
