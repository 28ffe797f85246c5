"""Units -> result records: one after the other in one process, or in step on ranks that share one copy of the experts.

With shared experts a pass is collective: in every layer tokens travel to the ranks that hold their experts, and back.
So in each round a rank runs its next unit, or a filler of one token once it has none, until no rank has any left; how
units are spread over ranks is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from seuf_ray.attribution.bootstrap import Bootstrap
from seuf_ray.attribution.statistics import RoutingStatistics, unit_statistics
from seuf_ray.attribution.units import Record, account, unit_batch
from seuf_ray.model.moe import MoEModel
from seuf_ray.passes import Batch

T = TypeVar("T")


@torch.no_grad()
def unit_result(model: MoEModel, unit: Record, bootstraps: Mapping[str, Bootstrap], pad_id: int) -> Record:
    """What a unit's routing adds up to, beside its account; a unit without tokens is not run.

    Args:
        unit: as `units.pack_chunk` makes it.
        bootstraps: of each set.
        pad_id: token of padding.
    """
    bootstrap, shape = bootstraps[unit["data"]], model.shape
    if (read := unit_batch(unit, bootstrap, pad_id)) is None:
        found = RoutingStatistics.zero(len(shape.moe_layers), shape.num_experts, bootstrap)
    else:
        batch, sequences = read
        logits, choices = model.route(batch.to(model.device))
        found = unit_statistics(logits, choices, sequences, shape)
    return account(unit) | found.to_record()


@torch.no_grad()
def results_in_step(
    model: MoEModel, units: Iterable[Record], bootstraps: Mapping[str, Bootstrap], pad_id: int
) -> Iterator[Record]:
    """The result of every unit of this rank; every rank reads on to the end, one without units as well.

    Args:
        model: sharded by `deepspeed_engine.shard_experts`.
        units: this rank's.
        bootstraps, pad_id: as `unit_result` takes them.
    """
    for unit in _in_step(iter(units), model.device):
        if unit is None or not unit["lengths"]:
            model.route(_filler().to(model.device))
        if unit is not None:
            yield unit_result(model, unit, bootstraps, pad_id)


def _in_step(mine: Iterator[T], device: torch.device) -> Iterator[T | None]:
    """This rank's items, then None, as often on every rank as the one with the most items needs."""
    while True:
        item = next(mine, None)
        busy = torch.tensor(float(item is not None), device=device)
        dist.all_reduce(busy)
        if not busy:
            return
        yield item


def _filler() -> Batch:
    """The smallest batch there is; nothing of it counts."""
    one = torch.ones(1, 1, dtype=torch.bool)
    return Batch(torch.zeros(1, 1, dtype=torch.long), one, ~one, is_filler=True)
