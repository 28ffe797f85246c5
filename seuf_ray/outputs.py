"""What a job leaves in `output_dir`: the names of its files, whose folder it is, and the parts that jobs write alike.

A folder belongs to one configuration at a time; `job.json` says to which.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seuf_ray import artifacts, patch
from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.config import JobConfig
from seuf_ray.errors import ConfigError
from seuf_ray.job import Job

PLAN, ATTRIBUTION = "plan.json", "attribution.json"
BEFORE, AFTER = "evaluation_before.json", "evaluation_after.json"
# What the unlearning stage writes.
TRAINED = (PLAN, "metrics.jsonl", "tensorboard", "patch", "train", "cache")
ATTRIBUTED = (ATTRIBUTION, "attribution.parquet", "attribution.html", "esft.json")
EVERYTHING = (*ATTRIBUTED, *TRAINED, BEFORE, AFTER, "comparison.json", "compare", "report.html")


def claim(config: JobConfig, *outputs: str) -> None:
    """Take possession of `output_dir` for a stage that writes `outputs` there.

    Raises:
        ConfigError: it belongs to another configuration, or holds these outputs already, and neither `resume` (same
            configuration only) nor `overwrite` (removes these outputs, nothing else) is set.
    """
    folder, own = config.output_dir, _own_fingerprint(config)
    held = _held_by(folder)
    if config.overwrite:
        _remove(folder, outputs)
    elif held not in (None, own):
        raise ConfigError(
            f"output_dir {folder} already holds another run: choose another folder, or set overwrite=true"
        )
    elif not config.resume and (there := [name for name in outputs if (folder / name).exists()]):
        raise ConfigError(
            f"output_dir {folder} already holds {', '.join(there)} of this job: set resume=true to keep and continue, "
            "or overwrite=true to replace"
        )
    document = {"config": config.model_dump(mode="json"), "fingerprint": own}
    artifacts.write_text(folder / "job.json", json.dumps(document, indent=1) + "\n")


def _own_fingerprint(config: JobConfig) -> str:
    return artifacts.fingerprint(
        config.model_dump(mode="json", exclude={"resume", "overwrite", "output_dir"})
    )


def _held_by(folder: Path) -> str | None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    try:
        return str(json.loads((folder / "job.json").read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError):
        return "unknown"


def _remove(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_patch(job: Job, plan: UnlearningPlan, tensors: dict[str, Any], name: str = "patch") -> Path:
    """The trained tensors as a folder of the output folder."""
    made = artifacts.provenance(job.config.seed, plan=plan.fingerprint, model=job.identity.fingerprint)
    folder = job.path(name)
    config = job.config.model_dump(mode="json")
    patch.write(folder, job.checkpoint, job.identity, plan, config, tensors, made)
    return folder


def read_metrics(job: Job) -> list[dict[str, Any]]:
    """The small evaluations of `metrics.jsonl`, in order."""
    lines = job.path("metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def clear_cache(job: Job) -> None:
    """Remove what workers spilled, and nothing else of the folder that `engine.cache_dir` names."""
    shutil.rmtree(job.cache_dir, ignore_errors=True)
