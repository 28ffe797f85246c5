"""Where a checkpoint's tensors live in a transformers model: per-expert names against fused parameters.

checkpoint                                            module (transformers 5, every family)
model.layers.4.mlp.experts.5.gate_proj.weight (F, D)  model.layers.4.mlp.experts.gate_up_proj[5, :F]
model.layers.4.mlp.experts.5.up_proj.weight   (F, D)  model.layers.4.mlp.experts.gate_up_proj[5, F:]
model.layers.4.mlp.experts.5.down_proj.weight (D, F)  model.layers.4.mlp.experts.down_proj[5]
anything else                                         the same name, the MoE block being called mlp
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from seuf_ray.families import Family, Part

_GATE_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


class Place(NamedTuple):
    """A parameter or buffer of the module, and the part of it that a checkpoint tensor is."""

    path: str
    expert: int | None = None
    part: Part | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """That part of the parameter `tensor`, sharing its memory; raises IndexError beyond the last expert."""
        if self.expert is None:
            return tensor
        if self.part == "down":
            return tensor[self.expert]
        gate, up = tensor[self.expert].chunk(2)
        return gate if self.part == "gate" else up


def place(family: Family, name: str) -> Place:
    """Where the checkpoint tensor `name` would be; whether the module has it is not asked."""
    if (found := family.parse_expert(name)) is None:
        return Place(name.replace(f".{family.block}.", ".mlp."))
    layer, expert, part = found
    return Place(f"model.layers.{layer}{_DOWN if part == 'down' else _GATE_UP}", expert, part)


def stored_names(family: Family, path: str, num_experts: int) -> list[str]:
    """Names of the checkpoint tensors that the parameter or buffer `path` is made of; the inverse of `place`."""
    if not path.endswith((_GATE_UP, _DOWN)):
        return [path.replace(".mlp.", f".{family.block}.")]
    layer = int(path.split(".")[2])
    parts: tuple[Part, ...] = ("down",) if path.endswith(_DOWN) else ("gate", "up")
    return [family.expert_tensor(layer, expert, part) for expert in range(num_experts) for part in parts]


def view(module: nn.Module, family: Family, name: str) -> Tensor:
    """The part of a parameter that the checkpoint calls `name`, sharing its memory.

    Raises:
        KeyError: the model has no such parameter.
    """
    at = place(family, name)
    try:
        return at.of(module.get_parameter(at.path).data)
    except (AttributeError, IndexError):
        raise KeyError(f"{name}: the model has no such tensor") from None
