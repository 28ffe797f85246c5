"""Attribution as a Ray Data job: forget units stream to actors that hold the model; integers come back."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from seuf_ray.artifacts import AttributionReport, provenance
from seuf_ray.attribution import RoutingStatistics, make_report, unit_statistics
from seuf_ray.batches import collate, units
from seuf_ray.checkpoint import Checkpoint
from seuf_ray.data import Row
from seuf_ray.job import ATTRIBUTION, Job
from seuf_ray.model import MoEModel
from seuf_ray.stages.data import as_record, rows_of, through_actors

FIELDS = ("affinity", "router_score", "slots")


class Attributor:
    """An actor: the model, and one unit's statistics per call."""

    def __init__(self, folder: Path, dtype: str, pad_id: int, use_gpu: bool) -> None:
        self.model = MoEModel(Checkpoint(folder), getattr(torch, dtype), "cuda" if use_gpu else "cpu")
        self.pad_id = pad_id

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._score(record) for record in table.to_pylist()])

    @torch.no_grad()
    def _score(self, record: dict[str, Any]) -> dict[str, Any]:
        rows = rows_of(record)
        logits, choices = self.model.route(collate(rows, self.pad_id).to(self.model.device))
        found = unit_statistics(logits, choices, [len(row.ids) for row in rows], self.model.shape)
        sums = {name: getattr(found, name).ravel().tolist() for name in FIELDS}
        return {
            "unit_id": record["unit_id"],
            **sums,
            "sequences": found.num_sequences,
            "tokens": found.num_tokens,
        }


def attribute(job: Job) -> AttributionReport:
    """Score every expert on the forget set and write `attribution.json`."""
    if (kept := job.kept(AttributionReport, ATTRIBUTION)) is not None:
        return kept
    config, shape = job.config, job.checkpoint.shape
    rows = first_tokens(job.forget.rows, config.attribution.max_tokens)
    records = [as_record(i, unit) for i, unit in enumerate(units(rows, config.attribution.unit_rows))]
    arguments = {
        "folder": job.checkpoint.folder,
        "dtype": config.model.dtype,
        "pad_id": job.pad_id,
        "use_gpu": config.cluster.gpus_per_worker > 0,
    }
    results = through_actors(records, Attributor, arguments, config.attribution.num_actors, config.cluster)
    size = (len(shape.moe_layers), shape.num_experts)
    statistics = functools.reduce(operator.add, (_statistics(result, size) for result in results))
    made = provenance(config.seed, model=job.identity.fingerprint)
    report = make_report(statistics, shape, config.attribution, job.identity, job.forget.summary, made)
    report.write(job.path(ATTRIBUTION))
    return report


def first_tokens(rows: list[Row], max_tokens: int | None) -> list[Row]:
    """The first rows with about `max_tokens` tokens together; at least one row."""
    if max_tokens is None:
        return rows
    ends = np.cumsum([len(row.ids) for row in rows])
    return rows[: int(np.searchsorted(ends, max_tokens)) + 1]


def _statistics(result: dict[str, Any], size: tuple[int, int]) -> RoutingStatistics:
    arrays = {name: np.array(result[name], dtype=np.int64).reshape(size) for name in FIELDS}
    return RoutingStatistics(**arrays, num_sequences=result["sequences"], num_tokens=result["tokens"])
