"""A search without Ray: what is checked before it starts, and what it leaves when its trials are over.

search.json                   every trial, the best, the front, importance: an artifact like the others
search.parquet, search.csv    one row per trial, a column per path and figure
patch/, plan.json             of the best trial; of pareto patches/NUMBER/ for every trial of the front
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from safetensors.torch import load_file

from seuf_ray.artifacts import (
    AttributionReport,
    PatchManifest,
    SearchReport,
    TrialRecord,
    UnlearningPlan,
    provenance,
)
from seuf_ray.attribution.selection import plan_for
from seuf_ray.attribution.table import write_trials
from seuf_ray.config import JobConfig, SearchConfig
from seuf_ray.errors import ConfigError
from seuf_ray.feasibility import check_job
from seuf_ray.job import Job, prepare
from seuf_ray.outputs import AFTER, BEFORE, PLAN, clear_cache, write_patch
from seuf_ray.search import objectives, spaces, suggestions
from seuf_ray.search.checking import blamed_on, check, examples
from seuf_ray.search.importance import importance
from seuf_ray.search.parsing import flat
from seuf_ray.search.schedule import FOLDER, tensors_path

TUNE = "tune"  # Tune's own folder while trials run
SEARCHED = (  # what the search writes
    *("trials", "tensorboard", "search.json", "search.parquet", "search.csv", "patches", "patch"),
    *(PLAN, TUNE, "cache", BEFORE, AFTER, "report.html"),
)


def prepare_search(config: JobConfig) -> Job:
    """The search's job with its inputs read, and every value and pair of values of its spaces checked on the model.

    Raises:
        ConfigError: the space is not usable as written, a job with some of its values is not, or the searcher is not
            installed.
    """
    found = check(config)
    suggestions.searcher(config, found)
    if config.cluster.zero_stage or config.cluster.engine == "deepspeed":
        raise ConfigError(
            "a search keeps the model over trials, which DeepSpeed's engine cannot: set cluster.zero_stage = 0 and "
            'cluster.engine = "auto" (experts are shared among workers all the same)'
        )
    job = prepare(config)
    for assignment, space in examples(found):
        with blamed_on(space, assignment):
            check_job(spaces.derive_trial(config, assignment), job.checkpoint)
    return job


def sweep(job: Job) -> None:
    """Remove what a killed search left half done; only before workers start, which write such files themselves."""
    for unfinished in job.path(FOLDER).glob(".[0-9]*"):
        unfinished.unlink(missing_ok=True)
    shutil.rmtree(job.path(TUNE), ignore_errors=True)
    clear_cache(job)


def finish_search(job: Job, report: AttributionReport, trials: Sequence[TrialRecord]) -> SearchReport:
    """Write everything that a search leaves but its page; `trials/` has the tensors of what is chosen."""
    config = job.config.search
    winner, chosen = objectives.best(trials, config), objectives.chosen(trials, config)
    patches = {}
    if config.objective == "pareto":
        for trial in chosen:
            patches[trial.number] = _write_patch(job, report, trial, f"patches/{trial.number:04d}")
    if winner is not None:
        patches[winner.number] = _write_patch(job, report, winner, "patch")
        _plan(job, report, winner).write(job.path(PLAN))
    made = provenance(job.config.seed, attribution=report.fingerprint, model=job.identity.fingerprint)
    found = SearchReport(
        model=job.identity,
        provenance=made,
        searcher=config.searcher,
        scheduler=config.scheduler,
        objective=objectives.words(config),
        goal=config.objective,
        limit=objectives.limit(config),
        space=flat(config.space),
        trials=list(trials),
        scores=[_score(trial, config) for trial in trials],
        best=winner.number if winner else None,
        chosen=[trial.number for trial in chosen],
        overrides=spaces.overrides(winner.assignment) if winner else [],
        importance=importance(trials, config),
        patches=patches,
    )
    write_trials(job.path("search.parquet"), job.path("search.csv"), found)
    found.write(job.path("search.json"))
    return found


def _plan(job: Job, report: AttributionReport, trial: TrialRecord) -> UnlearningPlan:
    return plan_for(spaces.derive_trial(job.config, trial.assignment), report, job.checkpoint)


def _write_patch(job: Job, report: AttributionReport, trial: TrialRecord, name: str) -> str:
    """The trial's patch, with its own job in the manifest; its fingerprint."""
    plan = _plan(job, report, trial)
    tensors = load_file(tensors_path(job.path(FOLDER), trial.number))
    alone = job.with_config(spaces.derive_trial(job.config, trial.assignment))
    return PatchManifest.read(write_patch(alone, plan, tensors, name) / "manifest.json").fingerprint


def _score(trial: TrialRecord, config: SearchConfig) -> float | None:
    return objectives.score(trial.figures, config) if objectives.is_result(trial) else None
