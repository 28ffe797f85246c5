"""Units of work through Ray Data actors, each counted exactly once.

Actors hold the model, never the statistics: Ray may run a unit twice (a killed actor, a lost node), but its output
row appears once. A unit is a fixed group of rows made in a global order, one row of the dataset, one forward pass; so
the numbers do not depend on blocks, actors, order or retries.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.data

from seuf_ray.config import ClusterConfig
from seuf_ray.data import Row
from seuf_ray.errors import ConfigError


def as_record(unit_id: int, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """A unit as one row of a dataset."""
    return {
        "unit_id": unit_id,
        "ids": [list(row.ids) for row in rows],
        "num_context": [row.num_context for row in rows],
        **more,
    }


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The rows of a unit's record."""
    return [Row(tuple(ids), start) for ids, start in zip(record["ids"], record["num_context"], strict=True)]


def through_actors(
    records: Sequence[dict[str, Any]],
    actor: type,
    arguments: dict[str, Any],
    num_actors: int,
    cluster: ClusterConfig,
) -> Iterator[dict[str, Any]]:
    """Every unit through a pool of `num_actors` actors; yields one result per unit, in any order.

    Args:
        records: units from `as_record`, unit_id counting from 0.
        actor: class with `__call__(table: pyarrow.Table) -> pyarrow.Table` of one output row per unit.
        arguments: keyword arguments of its constructor.

    Raises:
        ConfigError: the pool cannot be placed beside the tasks that feed it.
    """
    _require_room(num_actors, cluster)
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = 600  # the only guard against a unit that always kills its actor
    context.enable_progress_bars = sys.stderr.isatty()
    dataset = ray.data.from_items(list(records), override_num_blocks=min(len(records), 200)).map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
    )
    seen: set[int] = set()
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for result in table.to_pylist():
            seen.add(result["unit_id"])
            yield result
    assert len(seen) == len(records), f"{len(records)} units went in, {len(seen)} came out"


def _require_room(num_actors: int, cluster: ClusterConfig) -> None:
    """The tasks that feed the actors need one CPU; without it nothing would ever run, silently."""
    for name, each, spare in (("CPU", cluster.cpus_per_worker, 1.0), ("GPU", cluster.gpus_per_worker, 0.0)):
        there, needed = ray.cluster_resources().get(name, 0.0), num_actors * each + spare * bool(each)
        if needed > there:
            raise ConfigError(
                f"{num_actors} actors of {each:g} {name} (attribution.num_actors, cluster.*_per_worker) and the tasks "
                f"that feed them need {needed:g} {name}, the Ray cluster has {there:g}"
            )
