"""Evaluation as a Ray Data job: questions and texts stream to actors that hold the original and, beside it, the patch.

An actor runs each unit through the patched model, and texts for routing drift through the original too: one model in
memory, the patch's tensors exchanged in and out. Sums come back per unit and are added with `math.fsum`, which rounds
once, so the result does not depend on actors or order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from torch import Tensor

from seuf_ray import evaluation, patch
from seuf_ray.artifacts import EvaluationReport, Statistic, provenance
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.data.batches import collate, spread, units
from seuf_ray.job import Job
from seuf_ray.model.moe import MoEModel
from seuf_ray.outputs import AFTER, BEFORE
from seuf_ray.passes import Forward
from seuf_ray.stages.data import as_record, rows_of, through_actors

FIGURES = ("overlap_top1", "overlap_topk", "kl")
Sums = dict[str, dict[str, Statistic]]  # group -> figure -> (sum, count)


class Evaluator:
    """An actor: the original model, the patch's tensors, and one unit's sums per call."""

    def __init__(self, folder: Path, dtype: str, pad_id: int, use_gpu: bool, tensors: ray.ObjectRef) -> None:
        self.model = MoEModel(Checkpoint(folder), getattr(torch, dtype), "cuda" if use_gpu else "cpu")
        self.original: dict[str, Tensor] = self.model.exchange(ray.get(tensors))
        self.pad_id = pad_id

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._measure(record) for record in table.to_pylist()])

    @torch.no_grad()
    def _measure(self, record: dict[str, Any]) -> dict[str, Any]:
        batch = collate(rows_of(record), self.pad_id).to(self.model.device)
        current = self.model.forward(batch)
        kind = record["group"].partition("/")[0]
        if kind == "drift":
            found = self._drift(self._run_original(batch), current)
        elif kind == "nll":
            found = {"nll": evaluation.nll_statistic(current.logps, current.mask)}
        else:
            logps = current.sequence_logps().cpu()
            found = {"correct": evaluation.accuracy(logps, record["answers"], record["num_choices"])}
        flat = [{"figure": name, "sum": s.sum, "count": s.count} for name, s in found.items()]
        return {"unit_id": record["unit_id"], "group": record["group"], "found": flat}

    def _run_original(self, batch: Any) -> Forward:
        patched = self.model.exchange(self.original)
        try:
            return self.model.forward(batch)
        finally:
            self.model.exchange(patched)

    def _drift(self, original: Forward, current: Forward) -> dict[str, Statistic]:
        found = evaluation.drift(original, current, self.model.shape.scoring)
        return {f"{figure}/{layer}": s for figure, layers in found.items() for layer, s in layers.items()}


def evaluate(job: Job, patch_folder: Path | None = None) -> EvaluationReport:
    """Evaluate the original, or it with a patch; writes `evaluation_before.json` or `evaluation_after.json`."""
    name = AFTER if patch_folder else BEFORE
    if (kept := job.kept(EvaluationReport, name)) is not None:
        return kept
    manifest, tensors = patch.read(patch_folder) if patch_folder else (None, {})
    if manifest is not None and patch_folder is not None:
        manifest.require_model(job.identity, patch_folder)
    config = job.config
    arguments = {
        "folder": job.checkpoint.folder,
        "dtype": config.model.dtype,
        "pad_id": job.pad_id,
        "use_gpu": config.cluster.gpus_per_worker > 0,
        "tensors": ray.put(tensors),
    }
    records = _records(job)
    units = ray.data.from_items(records, override_num_blocks=min(len(records), 200))
    results = list(through_actors(units, Evaluator, arguments, config.attribution.num_actors, config.cluster))
    assert len({result["unit_id"] for result in results}) == len(results) == len(records)
    made_from = {"model": job.identity.fingerprint} | ({"patch": manifest.fingerprint} if manifest else {})
    report = EvaluationReport(
        model=job.identity,
        provenance=provenance(config.seed, **made_from),
        patch=manifest.fingerprint if manifest else None,
        **_fields(job, _add(results)),
    )
    report.write(job.path(name))
    return report


def _records(job: Job) -> list[dict[str, Any]]:
    """Every unit of the evaluation, largest groups first in a fixed order."""
    records: list[dict[str, Any]] = []
    unit_rows, most = job.config.evaluation.unit_rows, job.config.evaluation.max_texts
    for kind, quizzes in (("forget", job.forget_quizzes), ("utility", job.utility_quizzes)):
        for quiz in quizzes:
            for unit in quiz.units(max(1, unit_rows // quiz.num_choices)):
                more = {
                    "group": f"{kind}/{quiz.source}",
                    "answers": unit.answers,
                    "num_choices": unit.num_choices,
                }
                records.append(as_record(len(records), unit.rows, **more))
    texts = {"nll": job.perplexity.rows, "drift/forget": job.forget.rows, "drift/retain": job.retain.rows}
    for group, rows in texts.items():
        for part in units(spread(rows, most), unit_rows):
            records.append(as_record(len(records), part, group=group, answers=[], num_choices=0))
    return records


def _add(results: list[dict[str, Any]]) -> Sums:
    parts: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for found in result["found"]:
            parts[result["group"]][found["figure"]].append((found["sum"], found["count"]))
    return {
        group: {
            name: Statistic(sum=math.fsum(s for s, _ in v), count=math.fsum(n for _, n in v))
            for name, v in f.items()
        }
        for group, f in parts.items()
    }


def _fields(job: Job, sums: Sums) -> dict[str, Any]:
    layers = job.checkpoint.shape.moe_layers
    drift = {
        figure: {
            side: {at: sums[f"drift/{side}"][f"{figure}/{at}"] for at in layers}
            for side in ("forget", "retain")
        }
        for figure in FIGURES
    }
    return {
        "forget": {quiz.source: sums[f"forget/{quiz.source}"]["correct"] for quiz in job.forget_quizzes},
        "utility": {quiz.source: sums[f"utility/{quiz.source}"]["correct"] for quiz in job.utility_quizzes},
        "nll": sums["nll"]["nll"],
        **drift,
    }
