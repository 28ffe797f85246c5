"""What the unlearning loop needs of an engine.

Passes go up, tensors go down: the loop asks for `Forward`s of batches (of the trained model or of the original) and
hands back scalars to minimise. What trains is known by checkpoint names. Nothing else crosses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from seuf_ray.model.moe import ALL
from seuf_ray.passes import Batch, Counts, Forward
from seuf_ray.plugins import Reads

State = dict[str, Any]


class Engine(Protocol):
    """What the unlearning loop needs."""

    rank: int
    world_size: int

    def forward(
        self,
        batch: Batch,
        *,
        reference: bool = False,
        grad: bool = False,
        reads: Reads = ALL,
        counts: Counts | None = None,
    ) -> Forward:
        """One pass of this rank's share of a batch.

        Args:
            reference: run the original model (never with gradients).
            reads: what is wanted of it besides routing.
            counts: of the whole batch per rank; default: of what all ranks pass now.
        """

    def counts(self, parts: list[Batch]) -> Counts:
        """Counts of the batch that these parts, on all ranks, make up; divided by the number of ranks."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of `loss`; `last` says that no further part of this step's batch follows."""

    def step(self, learning_rate: float) -> float:
        """Clip and step; returns the norm over the whole plan before clipping. A non-finite one steps nothing."""

    def broken_gradients(self) -> list[str]:
        """Names of the parameters whose gradients were not finite in the last step, on any rank."""

    def constrain(self, bases: Mapping[int, Tensor]) -> None:
        """From now on steps change no router in the directions that `bases` has for its layer, (D, R) orthonormal."""

    def router_gradient(self, loss: Tensor) -> Tensor:
        """This rank's gradient of `loss` with respect to the routers that train, flat; a look, nothing is kept."""

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors under checkpoint names."""

    def total(self, values: Tensor) -> Tensor:
        """Element-wise sum of `values` over all ranks."""

    def state(self) -> State:
        """A copy of everything that training has changed: the trained parameters and the optimiser."""

    def load_state(self, state: State) -> None:
        """Go back to a state."""

    def detach(self) -> None:
        """Leave the model as it was before this engine, for another one; this one is of no use any more."""
