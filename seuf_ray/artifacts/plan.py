"""Which tensors train, and which of them a patch replaces."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from seuf_ray.artifacts.attribution import Expert
from seuf_ray.artifacts.record import Artifact, Record

IN_PLACE = ("full", "experts", "shared")  # scopes of baselines that train what lies in the model


class LoRA(Record):
    """Low-rank adapters in the place of the plan's tensors; the patch holds these merged."""

    rank: int
    alpha: float


class UnlearningPlan(Artifact):
    """Which tensors will train: target experts and the routers of their layers, or those of a baseline."""

    kind: Literal["plan"] = "plan"
    scope: str
    top_m: int
    experts: list[Expert]
    routers: list[int] = Field(description="layers whose router trains")
    tensors: list[str] = Field(description="checkpoint names of the trained tensors; empty means all (full)")
    num_trainable: int
    trainable_fraction: float

    lora: LoRA | None = None

    @property
    def is_full(self) -> bool:
        return self.scope == "full"

    @property
    def is_in_place(self) -> bool:
        """Whether the model's own parameters change, and not an overlay of a few experts and routers."""
        return self.scope in IN_PLACE

    @property
    def first_layer(self) -> int:
        """The lowest layer that changes; layers below it compute the same as in the original."""
        layers = [re.match(r"model\.layers\.(\d+)\.", name) for name in self.tensors]
        return min((int(found[1]) if found else 0 for found in layers), default=0)


class TensorChange(Record):
    """One tensor of a patch."""

    name: str
    dtype: str
    shape: list[int]
    base_sha256: str = Field(description="of the tensor it replaces")
    sha256: str = Field(description="of the new tensor")


class PatchManifest(Artifact):
    """What `patch.safetensors` changes, and in which checkpoint only."""

    kind: Literal["patch"] = "patch"
    plan: UnlearningPlan
    config: dict[str, Any] = Field(description="the job that trained it")
    tensors: list[TensorChange]
