"""One cell of the matrix in one process: train as the cell says, measure on the test half, attack what is left.

The same engine, loop and small evaluation as in every other job; nothing here knows Ray. `overlap` and `kl` are means
over the MoE layers on forget texts, against the original; `perplexity` is on general text.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import mean

from seuf_ray import unlearning
from seuf_ray.artifacts import AttributionReport, CurvePoint, UnlearningPlan, provenance
from seuf_ray.attribution.selection import choose_targets
from seuf_ray.config import JobConfig, derive, validate
from seuf_ray.data.batches import spread
from seuf_ray.engine import LocalEngine
from seuf_ray.evaluation import interpolate_utility
from seuf_ray.job import Job
from seuf_ray.model.moe import MoEModel
from seuf_ray.model.spans import ConstantCache
from seuf_ray.monitor import Monitor, Task
from seuf_ray.paper.cells import Cell, Result
from seuf_ray.paper.methods import ALGORITHMS, METHODS, ORIGINAL
from seuf_ray.paper.settings import PaperSettings
from seuf_ray.paper.splits import Split, sampled

Metrics = dict[str, float]


@dataclass(frozen=True)
class Materials:
    """What cells of one model and forget set share: their job's checkpoint and data, and the attribution report."""

    settings: PaperSettings
    job: Job
    report: AttributionReport


def base_config(settings: PaperSettings, model: str, forget: str) -> JobConfig:
    """The job that cells of this model and forget set have in common.

    Raises:
        ConfigError: an override of the settings is not allowed.
    """
    values = {
        "output_dir": str(settings.output_dir / "attribution" / _slug(model) / _slug(forget)),
        "model": {"name": model},
        "data": {"forget": [forget]},
        "telemetry": {"every": 0, "anchor_gradient_every": 0},
        "resume": True,
    }
    return derive(validate(values), settings.overrides)


def cell_config(settings: PaperSettings, cell: Cell) -> JobConfig:
    """The whole job of a cell."""
    training = [
        f"training.learning_rate={cell.learning_rate!r}",
        f"training.steps={cell.steps}",
        f"training.evaluate_every={cell.evaluate_every}",
    ]
    if cell.protocol != "fixed":
        training.append(f"training.stop_at_forget_accuracy={settings.matched_level}")
    own = [
        *METHODS[cell.method].overrides,
        *ALGORITHMS[cell.algorithm],
        f"seed={cell.seed}",
        *training,
    ]
    return derive(base_config(settings, cell.model, cell.forget), own)


def plan_of(materials: Materials, config: JobConfig) -> UnlearningPlan:
    """What trains; ESFT ranks by its own score, the share of tokens."""
    report = materials.report
    if config.targets.scope == "esft":
        report = report.model_copy(update={"score": "token_share"})
    made = provenance(config.seed, attribution=materials.report.fingerprint)
    trains = config.anchor.name != "frozen"
    return choose_targets(report, config.targets, materials.job.checkpoint, made, train_routers=trains)


def run_cell(cell: Cell, materials: Materials) -> Result:
    """Train, measure, attack: the cell's row, its curve, and what the attacks found."""
    from seuf_ray.paper.attacks import attack  # it needs what is above

    started, config = time.perf_counter(), cell_config(materials.settings, cell)
    plan = plan_of(materials, config)
    engine = LocalEngine(MoEModel(materials.job.checkpoint), plan, config.training, config.engine)
    curve = [] if cell.method == ORIGINAL else train(engine, config, materials, plan, cell)
    measured = measure(engine, materials, plan) if cell.protocol != "tune" else {}
    row = {**_names(cell, materials.settings, plan, curve), **measured}
    result = {"row": row, "curve": [point.model_dump(mode="json") for point in curve]}
    if cell.attacked:
        result["robustness"] = attack(engine, materials, config)
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def train(
    engine: LocalEngine, config: JobConfig, materials: Materials, plan: UnlearningPlan, cell: Cell
) -> list[CurvePoint]:
    """The loop, and what its small evaluations found."""
    measuring = materials.settings.measuring
    most = measuring.curve if cell.protocol == "fixed" else measuring.matched
    task = task_of(materials, "validation" if cell.protocol == "tune" else "test", most, num_probes=32)
    steps = unlearning.run(engine, config, materials.job.targets(plan), task)
    found = [(progress.step, progress.metrics) for progress in steps]
    return [
        CurvePoint(step=step, forget_accuracy=metrics["forget_accuracy"], utility=metrics["utility"])
        for step, metrics in found
    ]


def task_of(materials: Materials, split: Split, most: int, num_probes: int) -> Task:
    """Training rows, and `most` questions of each kind from one half."""
    job = materials.job
    kinds = {"forget": job.forget_quizzes, "utility": job.utility_quizzes}
    return Task(
        forget=job.forget.rows,
        retain=job.retain.rows,
        quizzes={name: sampled(quizzes, split, most) for name, quizzes in kinds.items()},
        probes={
            "forget": spread(job.forget.rows, num_probes),
            "retain": spread(job.perplexity.rows, num_probes),
        },
        pad_id=job.pad_id,
    )


def measure(engine: LocalEngine, materials: Materials, plan: UnlearningPlan) -> Metrics:
    """The figures of a row, on the test half."""
    measuring = materials.settings.measuring
    task = task_of(materials, "test", measuring.final, measuring.texts)
    engine.cache = ConstantCache(engine.config.prefix_cache_bytes)  # other batches go by the names it has
    metrics = Monitor(engine, task, materials.job.targets(plan)).measure()
    nll = metrics["nll/retain"]
    return {
        "forget": metrics["forget_accuracy"],
        "utility": metrics["utility"],
        "perplexity": math.exp(nll) if nll < 700 else None,  # type: ignore[dict-item]
        "overlap": _mean(metrics, "overlap_top1/forget/"),
        "kl": _mean(metrics, "kl/forget/"),
    }


def _mean(metrics: Metrics, prefix: str) -> float:
    return mean(value for name, value in metrics.items() if name.startswith(prefix))


def _names(cell: Cell, settings: PaperSettings, plan: UnlearningPlan, curve: list[CurvePoint]) -> Result:
    """What the row is of; steps are those that were taken."""
    trained = 0.0 if cell.method == ORIGINAL else plan.trainable_fraction
    return {
        "model": cell.model,
        "forget_set": cell.forget,
        "method": cell.method,
        "algorithm": cell.algorithm,
        "seed": cell.seed,
        "protocol": cell.protocol,
        "learning_rate": cell.learning_rate,
        "steps": curve[-1].step if curve else 0,
        "trainable_fraction": trained,
        "utility_at_level": interpolate_utility(curve, settings.matched_level) if curve else None,
    }


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
