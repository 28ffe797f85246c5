"""What an anchor may ask for besides a loss: that routers stay as they are in a space of their inputs.

Before training, the original's router inputs x (D,) on retain rows are summed up, over all ranks and in float64, to
M = sum of x x^T. The anchor makes of M the directions in which no trained router may change, and the engine keeps them.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from seuf_ray.config import JobConfig
from seuf_ray.data.batches import share, spread
from seuf_ray.engine import Engine
from seuf_ray.monitor import Task
from seuf_ray.passes import Targets
from seuf_ray.plugins import Reads


@runtime_checkable
class Constraint(Protocol):
    """An anchor that protects a space; `num_rows` retain rows, evenly spread, say which."""

    num_rows: int

    def basis(self, moment: Tensor) -> Tensor:
        """(D, R) orthonormal directions of a router's inputs with the second moment `moment` (D, D)."""


def constrain(engine: Engine, config: JobConfig, targets: Targets, task: Task) -> dict[str, float]:
    """Have `engine` keep its routers as the anchor asks; another anchor sets them free.

    Returns:
        anchor/rank/LAYER: the number of protected directions, of the D that there are.
    """
    anchor, bases = config.anchor, {}
    if isinstance(anchor, Constraint):
        moments = router_moments(engine, config, targets.routers, task, anchor.num_rows)
        bases = {layer: _agreed(engine, anchor.basis(moment)) for layer, moment in moments.items()}
    engine.constrain(bases)
    return {f"anchor/rank/{layer}": float(basis.shape[1]) for layer, basis in bases.items()}


def router_moments(
    engine: Engine, config: JobConfig, layers: tuple[int, ...], task: Task, num_rows: int
) -> dict[int, Tensor]:
    """layer -> (D, D) sum of x x^T over the original's router inputs x at the real tokens of retain rows."""
    rows = spread(task.retain, num_rows)
    size = config.engine.micro_batch_size or config.training.batch_size
    reads = Reads(depth=max(layers) + 1, router_inputs=frozenset(layers))
    moments: dict[int, Tensor] = {}
    for start in range(0, len(rows), size * engine.world_size):
        part = rows[start : start + size * engine.world_size]
        batch = share(part, engine.rank, engine.world_size, task.pad_id)
        inputs = engine.forward(batch, reference=True, reads=reads).router_inputs
        for layer, values in inputs.items():
            moment = values.double().T @ values.double()
            moments[layer] = moments[layer] + moment if layer in moments else moment
    return {layer: engine.total(moment) for layer, moment in sorted(moments.items())}


def _agreed(engine: Engine, basis: Tensor) -> Tensor:
    """Rank 0's basis: another kind of processor may find other bits of the same directions."""
    return engine.total(basis if engine.rank == 0 else torch.zeros_like(basis))
