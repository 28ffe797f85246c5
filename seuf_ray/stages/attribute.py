"""Attribution as a Ray Data job: units of the forget and the retain set stream to whatever runs the model.

    actors            each holds the model; a unit is one pass
    expert_parallel   a worker group shares one copy of the experts (`attribute_parallel.py`)
    streamed          one task, one layer at a time from the checkpoint (`attribute_streamed.py`)

All give the same integers for a unit, and a ledger on the driver counts each unit once, so the report does not depend
on the engine's number of processes, on order, or on who was killed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa
import ray.data
import torch

from seuf_ray.artifacts import AttributionReport, DataSummary, provenance
from seuf_ray.attribution.bootstrap import Bootstrap
from seuf_ray.attribution.esft import esft_experts, write_experts
from seuf_ray.attribution.report import make_report
from seuf_ray.attribution.results import unit_result
from seuf_ray.attribution.statistics import RoutingStatistics
from seuf_ray.attribution.table import write_table
from seuf_ray.attribution.units import Ledger, Record
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.console import Meter, show_engine
from seuf_ray.errors import DataError
from seuf_ray.job import Job
from seuf_ray.model.moe import MoEModel
from seuf_ray.outputs import ATTRIBUTION
from seuf_ray.report import write_attribution_page
from seuf_ray.stages.attribute_parallel import through_group
from seuf_ray.stages.attribute_streamed import through_layers
from seuf_ray.stages.data import as_data_errors, through_actors, unit_dataset
from seuf_ray.stages.resources import fitting_engine

SETS: tuple[Literal["forget", "retain"], ...] = ("forget", "retain")
Bootstraps = Mapping[str, Bootstrap]
Ledgers = Mapping[str, Ledger]
Totals = dict[str, RoutingStatistics]
Engine = Callable[[Job, ray.data.Dataset, Bootstraps, Ledgers], Totals]


def attribute(job: Job) -> AttributionReport:
    """Score every expert on both sets; writes `attribution.json`, `.parquet`, `.html`, and `esft.json`.

    Raises:
        DataError: a source cannot be read, or has too many malformed rows.
        ConfigError: no engine can be placed.
    """
    if (kept := job.kept(AttributionReport, ATTRIBUTION)) is not None:
        return kept
    config = job.config
    sources = {"forget": config.data.forget, "retain": config.data.retain}
    bootstraps: Bootstraps = {name: Bootstrap.of(config.attribution, config.seed, name) for name in SETS}
    ledgers: Ledgers = {name: Ledger() for name in SETS}
    engine, why = _engine(job)
    show_engine(engine, why)  # not in the report, which is the same on a machine with other memory
    units = unit_dataset(config, job.checkpoint.folder, sources)
    with as_data_errors():
        totals = ENGINES[engine](job, units, bootstraps, ledgers)
    for name, ledger in ledgers.items():
        assert ledger.is_complete, f"{name}: {ledger}"
    found = {name: _summary(ledgers[name], sources[name], totals[name]) for name in SETS}
    report = make_report(
        totals["forget"],
        totals["retain"],
        job.checkpoint.shape,
        config.attribution,
        config.targets,
        model=job.identity,
        data=found["forget"],
        retain_data=found["retain"],
        provenance=provenance(config.seed, model=job.identity.fingerprint),
        engine=engine,
    )
    report.write(job.path(ATTRIBUTION))
    write_table(job.path("attribution.parquet"), report)
    write_attribution_page(job.path("attribution.html"), report)
    write_experts(job.path("esft.json"), esft_experts(report, config.targets.share))
    return report


def _summary(ledger: Ledger, sources: list[str], total: RoutingStatistics) -> DataSummary:
    if not total.num_sequences:
        raise DataError(f"{', '.join(sources)}: {ledger.num_texts} texts tokenise to nothing")
    return ledger.summary(sources, total.num_sequences, total.num_tokens)


def _engine(job: Job) -> tuple[str, str]:
    """The engine, and why: what the configuration says, or what fits."""
    config = job.config.attribution
    if config.engine != "auto":
        return config.engine, "as attribution.engine says"
    return fitting_engine(job)


class Attributor:
    """An actor: the model, and one unit's result per call; never the statistics, as Ray may run a unit twice."""

    def __init__(
        self, folder: Path, dtype: str, pad_id: int, use_gpu: bool, bootstraps: Bootstraps, num_threads: int
    ) -> None:
        torch.set_num_threads(num_threads)
        self.model = MoEModel(Checkpoint(folder), getattr(torch, dtype), "cuda" if use_gpu else "cpu")
        self.pad_id, self.bootstraps = pad_id, bootstraps

    def __call__(self, table: pa.Table) -> pa.Table:
        units = table.to_pylist()
        results = [unit_result(self.model, unit, self.bootstraps, self.pad_id) for unit in units]
        return pa.Table.from_pylist(results)


def actors(job: Job, units: ray.data.Dataset, bootstraps: Bootstraps, ledgers: Ledgers) -> Totals:
    """A pool of actors that hold the model."""
    config = job.config
    arguments = {
        "folder": job.checkpoint.folder,
        "dtype": config.model.dtype,
        "pad_id": job.pad_id,
        "use_gpu": config.cluster.gpus_per_worker > 0,
        "bootstraps": dict(bootstraps),
        "num_threads": max(1, int(config.cluster.cpus_per_worker)),
    }
    results = through_actors(units, Attributor, arguments, config.attribution.num_actors, config.cluster)
    return add_up(results, job, bootstraps, ledgers)


def expert_parallel(job: Job, units: ray.data.Dataset, bootstraps: Bootstraps, ledgers: Ledgers) -> Totals:
    """A worker group with one copy of the experts."""
    return add_up(through_group(job, units, bootstraps), job, bootstraps, ledgers)


def streamed(job: Job, units: ray.data.Dataset, bootstraps: Bootstraps, ledgers: Ledgers) -> Totals:
    """One task, one layer at a time."""
    totals, accounts = through_layers(job, units, bootstraps)
    for record in accounts:
        assert ledgers[record["data"]].add(record), "a task that starts again begins with nothing"
    return {name: totals.get(name, total) for name, total in _zeros(job, bootstraps).items()}


def add_up(results: Iterable[Record], job: Job, bootstraps: Bootstraps, ledgers: Ledgers) -> Totals:
    """The sums of result records in any order; what has come before does not count again."""
    totals, meter = _zeros(job, bootstraps), Meter(job.config.attribution.max_tokens, len(SETS))
    for record in results:
        if ledgers[record["data"]].add(record):
            found = RoutingStatistics.from_record(record)
            totals[record["data"]] += found
            meter.count(found.num_tokens, record["data"], record["share"])
    return totals


def _zeros(job: Job, bootstraps: Bootstraps) -> Totals:
    shape = job.checkpoint.shape
    size = (len(shape.moe_layers), shape.num_experts)
    return {name: RoutingStatistics.zero(*size, bootstrap) for name, bootstrap in bootstraps.items()}


ENGINES: dict[str, Engine] = {"actors": actors, "expert_parallel": expert_parallel, "streamed": streamed}
