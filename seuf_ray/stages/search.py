"""The search as a Ray Tune job: trials in the order of the schedule, on worker groups that keep the base.

Tune places, resets, retries and removes worker groups. Which trial comes next, and what is remembered of it, is the
schedule's (`schedule.py`): a driver that was killed goes on from the records, not from Tune's own state.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from seuf_ray import unlearning
from seuf_ray.artifacts import AttributionReport, TrialRecord
from seuf_ray.config import ClusterConfig
from seuf_ray.console import show_kept, show_room
from seuf_ray.job import Job
from seuf_ray.outputs import clear_cache
from seuf_ray.resources import autoscales, require_slots
from seuf_ray.search import objectives
from seuf_ray.search.checking import examples
from seuf_ray.search.outcome import TUNE, sweep
from seuf_ray.search.resident import Base
from seuf_ray.search.schedule import FOLDER, Schedule, tensors_path
from seuf_ray.search.spaces import derive_trial
from seuf_ray.stages.boards import TensorBoard
from seuf_ray.stages.session import nodes, require
from seuf_ray.stages.trials import TrialWorker, bundles, write_trial
from seuf_ray.stages.unlearn import make_task
from seuf_ray.unlearning import Progress

Listener = Callable[[TrialRecord, Sequence[TrialRecord], int], None]  # what ended, all that did, of how many
TOGETHER = {"TUNE_MAX_PENDING_TRIALS_PG": "1000"}  # groups start side by side; `InOrder` knows how many
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the records are ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # it prints its own tables, whatever verbose says
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # and so is the state
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "600",
}


def search(job: Job, report: AttributionReport, listener: Listener | None = None) -> list[TrialRecord]:
    """Run every trial that has no record yet; writes `trials/` and `tensorboard/`, and removes what a killed run left.

    Args:
        report: whose experts the trials choose their targets from.
        listener: called on the driver with each record.

    Raises:
        ConfigError: no worker group can be placed.
        KeyboardInterrupt: Tune was asked to stop.
    """
    require(job.config.cluster)
    sweep(job)
    schedule = Schedule(job.config, job.path(FOLDER))
    if schedule.kept:
        show_kept(schedule.kept, schedule.total)
    if len(schedule.records) < schedule.total:
        _run(job, schedule, base_of(job, report), listener)
    if len(schedule.records) < schedule.total:
        raise KeyboardInterrupt(
            f"{len(schedule.records)} of {schedule.total} trials are done; resume=true goes on"
        )
    _prune(job, schedule)
    return [schedule.records[number] for number in range(schedule.total)]


def base_of(job: Job, report: AttributionReport) -> Base:
    """What trials share; alternative answers are made where one of their algorithms prefers them."""
    configs = [
        derive_trial(job.config, assignment) for assignment, _ in examples(Schedule(job.config).spaces)
    ]
    asked = {name for config in configs for name in unlearning.passes_of(config.algorithm)}
    task = make_task(job, unlearning.sets_of(asked))
    return Base(job.config, job.checkpoint.folder, report, task, job.cache_dir)


def _run(job: Job, schedule: Schedule, base: Base, listener: Listener | None) -> None:
    for name, value in (QUIET | TOGETHER).items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    folder = str(job.path(FOLDER).absolute())
    trainable = tune.with_parameters(TrialWorker, base=base, folder=folder)
    recorder = Recorder(job, schedule, listener)
    wanted, left = job.config.search.max_concurrent, schedule.total - len(schedule.records)
    room = concurrent(job.config.cluster, wanted)
    if room < min(wanted, left):
        show_room(room, wanted)
    tuner = tune.Tuner(
        tune.with_resources(trainable, bundles(job.config.cluster)),
        tune_config=tune.TuneConfig(
            search_alg=InOrder(schedule, recorder, room),
            num_samples=left,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(job.config.output_dir.absolute()),
            failure_config=tune.FailureConfig(max_failures=job.config.cluster.max_failures),
            # While a trial that is over was being saved, its group was not free, and the next trial began another one.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[recorder],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        recorder.close()
        shutil.rmtree(job.path(TUNE), ignore_errors=True)
        clear_cache(job)


def concurrent(cluster: ClusterConfig, most: int) -> int:
    """So many worker groups, up to `most`, find room on the nodes that there are.

    Raises:
        ConfigError: not one does.
    """
    if autoscales():
        return most
    return min(most, require_slots(nodes(), cluster) // cluster.num_workers)


class _Unpickled:
    """Tune pickles what it is given for a restore that never happens: the records are enough."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Recorder(_Unpickled, tune.Callback):
    """Hears of every small evaluation and of every end."""

    def __init__(self, job: Job, schedule: Schedule, listener: Listener | None) -> None:
        self.job, self.schedule, self.listener = job, schedule, listener
        self.running: dict[str, int] = {}  # Tune's trial -> ours
        self._boards: dict[int, TensorBoard] = {}

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        number = self.running[trial.trial_id]
        if result["metrics"]:
            board = self._boards.setdefault(
                number, TensorBoard(self.job.path("tensorboard") / f"{number:04d}")
            )
            board.show(Progress(result["step"], result["metrics"]))
        if result["done"]:
            self._finish(trial.trial_id, TrialRecord.model_validate_json(result["record"]))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Lost more often than `cluster.max_failures` allows."""
        number, config = self.running[trial.trial_id], trial.config
        why = (str(trial.get_error() or "") or "its worker was lost").strip().splitlines()[-1]
        assignment = self.schedule.asked[number].assignment
        assert config["number"] == number
        self._finish(
            trial.trial_id, TrialRecord(number=number, assignment=assignment, status="failed", why=why)
        )

    def _finish(self, trial_id: str, record: TrialRecord) -> None:
        self.running.pop(trial_id)
        self.schedule.finish(record)
        if (board := self._boards.pop(record.number, None)) is not None:
            board.__exit__()
        _prune(self.job, self.schedule)
        if self.listener is not None:
            self.listener(record, list(self.schedule.records.values()), self.schedule.total)

    def close(self) -> None:
        for board in self._boards.values():
            board.__exit__()


class InOrder(_Unpickled, Searcher):
    """The schedule's trials, as many at once as there is room for."""

    def __init__(self, schedule: Schedule, recorder: Recorder, most: int) -> None:
        super().__init__()
        self.schedule, self.recorder, self.most = schedule, recorder, most

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self.recorder.running) >= self.most:
            return None
        trial = self.schedule.next()
        if trial is None:
            return Searcher.FINISHED if self.schedule.is_over else None
        self.recorder.running[trial_id] = trial.number
        return write_trial(trial)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """The recorder hears of it too, and knows more."""

    def save_to_dir(self, *_: Any, **__: Any) -> None:
        """Nothing: see the module."""

    def save(self, *_: Any) -> None:
        """Nothing: see the module."""

    def restore(self, *_: Any) -> None:
        """Nothing: see the module."""


def _prune(job: Job, schedule: Schedule) -> None:
    """Keep the tensors of what may still be the result; whoever is beaten now stays beaten."""
    records = list(schedule.records.values())
    useful = {record.number for record in objectives.chosen(records, job.config.search)}
    for record in records:
        if record.number not in useful:
            tensors_path(job.path(FOLDER), record.number).unlink(missing_ok=True)
