"""Units of work through Ray Data, each counted exactly once.

Actors hold the model, never the statistics: Ray may run a unit twice (a killed actor, a lost node), but its output
row appears once. A unit is a fixed group of rows made in a global order, one row of the dataset, one forward pass; so
the numbers do not depend on blocks, actors, order or retries.

    one reader a set, in order  ->  chunks  ->  tasks that tokenise and pack  ->  units  ->  actors  ->  results

Blocks are one row each, and operators run at the same time: what is between them is bounded, however long the sets are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError

from seuf_ray.attribution.units import first_tokens, pack_chunk, read_chunks
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import ClusterConfig, DataConfig, JobConfig
from seuf_ray.data.rows import Row, Tokenizer
from seuf_ray.errors import ConfigError, MismatchError
from seuf_ray.model.moe import load_tokenizer
from seuf_ray.resources import autoscales

TASK_CPUS = (
    0.25  # of tasks that read and pack: two readers and one packer find room in the CPU that actors leave
)
CHUNK = pa.schema(
    [
        ("data", pa.string()),
        ("chunk", pa.int64()),
        ("is_last_chunk", pa.bool_()),
        ("texts", pa.list_(pa.large_string())),
        ("first_text", pa.int64()),
        ("num_bad", pa.int64()),
        ("first_bad", pa.string()),
        ("share", pa.float64()),
    ]
)
UNIT = pa.schema(
    [
        ("data", pa.string()),
        ("chunk", pa.int64()),
        ("unit", pa.int64()),
        ("is_last_unit", pa.bool_()),
        ("is_last_chunk", pa.bool_()),
        ("num_texts", pa.int64()),
        ("num_bad", pa.int64()),
        ("first_bad", pa.string()),
        ("share", pa.float64()),
        ("tokens", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("indices", pa.list_(pa.int64())),
        ("rows", pa.list_(pa.int32())),
    ]
)


def unit_dataset(config: JobConfig, folder: Path, sources: Mapping[str, Sequence[str]]) -> ray.data.Dataset:
    """Packed units of all sets, one a row (`units.pack_chunk`), read when the dataset is.

    Args:
        folder: of the checkpoint with the tokenizer.
        sources: set -> its sources.
    """
    most, data = config.attribution.max_tokens, config.data
    packing = {
        "folder": folder,
        "sequence_length": data.sequence_length,
        "unit_rows": config.attribution.unit_rows,
    }
    sets = [{"data": name, "sources": list(listed)} for name, listed in sources.items()]
    found = ray.data.from_items(sets, override_num_blocks=len(sets))
    if most is not None:  # little to read, and whoever reads must know when to stop
        return _each(found, _read_first_units, data=data, max_tokens=most, packing=packing)
    return _each(_each(found, _read, data=data), _pack, **packing)


def _each(dataset: ray.data.Dataset, function: Any, **arguments: Any) -> ray.data.Dataset:
    """`function` of each row, in tasks; what it yields become rows of one block each, as soon as they are there."""
    mapped = dataset.map_batches(
        function, batch_size=1, batch_format="pyarrow", fn_kwargs=arguments, num_cpus=TASK_CPUS
    )
    return mapped.repartition(target_num_rows_per_block=1)


def _read(table: pa.Table, data: DataConfig) -> Iterator[pa.Table]:
    for row in table.to_pylist():
        for chunk in read_chunks(row["data"], row["sources"], data):
            yield pa.Table.from_pylist([chunk], CHUNK)


def _pack(table: pa.Table, folder: Path, sequence_length: int, unit_rows: int) -> Iterator[pa.Table]:
    for chunk in table.to_pylist():
        for unit in pack_chunk(chunk, _tokenizer(folder), sequence_length, unit_rows):
            yield pa.Table.from_pylist([unit], UNIT)


def _read_first_units(
    table: pa.Table, data: DataConfig, max_tokens: int, packing: dict[str, Any]
) -> Iterator[pa.Table]:
    for row in table.to_pylist():
        chunks = read_chunks(row["data"], row["sources"], data)
        tokenizer = _tokenizer(packing["folder"])
        units = (
            unit
            for chunk in chunks
            for unit in pack_chunk(chunk, tokenizer, packing["sequence_length"], packing["unit_rows"])
        )
        for unit in first_tokens(units, max_tokens):
            yield pa.Table.from_pylist([unit], UNIT)


def _tokenizer(folder: Path) -> Tokenizer:
    """One for all chunks that a worker packs."""
    return _loaded_tokenizer(str(folder))


@functools.cache
def _loaded_tokenizer(folder: str) -> Tokenizer:
    tokenizer: Tokenizer = load_tokenizer(Checkpoint(Path(folder)))
    return tokenizer


def as_record(unit_id: int, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """Rows that are padded, not packed, as one row of a dataset."""
    return {
        "unit_id": unit_id,
        "ids": [list(row.ids) for row in rows],
        "num_context": [row.num_context for row in rows],
        **more,
    }


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The rows of such a record."""
    return [Row(tuple(ids), start) for ids, start in zip(record["ids"], record["num_context"], strict=True)]


def through_actors(
    units: ray.data.Dataset, actor: type, arguments: dict[str, Any], num_actors: int, cluster: ClusterConfig
) -> Iterator[dict[str, Any]]:
    """Every unit through a pool of `num_actors` actors; yields one result per unit, in any order.

    Args:
        actor: class with `__call__(table: pyarrow.Table) -> pyarrow.Table` of one output row per unit.
        arguments: keyword arguments of its constructor.

    Raises:
        ConfigError: the pool cannot be placed beside the tasks that feed it.
    """
    require_room("attribution.num_actors", num_actors, cluster)
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = 600  # the only guard against a unit that always kills its actor
    context.enable_progress_bars = sys.stderr.isatty()
    results = units.map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
    )
    for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from table.to_pylist()


@contextmanager
def as_data_errors() -> Iterator[None]:
    """Inside, what a task says about the user's data is raised as if it had happened here."""
    try:
        yield
    except RayError as error:
        for cause in _causes(error):  # Ray's own exceptions take the type of their cause on
            if isinstance(cause, ConfigError | MismatchError) and not isinstance(cause, RayError):
                raise type(cause)(
                    str(cause).partition("\nFailed to apply UDF")[0]
                ) from None  # Ray adds advice
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def require_room(key: str, processes: int, cluster: ClusterConfig) -> None:
    """The tasks that feed so many actors or workers need one CPU; without it nothing would ever run, silently.

    Raises:
        ConfigError: there is less, and the cluster does not grow; `key` is what asked for the processes.
    """
    if autoscales():
        return
    for name, each, spare in (("CPU", cluster.cpus_per_worker, 1.0), ("GPU", cluster.gpus_per_worker, 0.0)):
        there, needed = ray.cluster_resources().get(name, 0.0), processes * each + spare * bool(each)
        if needed > there:
            raise ConfigError(
                f"{key} = {processes} with {each:g} {name} each (cluster.*_per_worker) and the tasks that feed them "
                f"need {needed:g} {name}, the Ray cluster has {there:g}"
            )
