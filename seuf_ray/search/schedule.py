"""The order of a search: which trial comes next, what it may know, and the file that says how each one ended.

    trials/0007.json    written when trial 7 is over, aside and renamed; the search's memory

Trial n knows the results of trials 0 ... n - lag and no others, however many run at once and whichever ends first. So
same seed, same trials. A search that goes on reads the files, asks for every assignment again and runs what is missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from seuf_ray.artifacts import TrialRecord, write_text
from seuf_ray.config import JobConfig
from seuf_ray.errors import ConfigError, MismatchError
from seuf_ray.search import halving, suggestions
from seuf_ray.search.checking import check
from seuf_ray.search.halving import Cuts
from seuf_ray.search.spaces import Assignment, Space, derive_trial

FOLDER = "trials"


@dataclass(frozen=True)
class Trial:
    """What is to be run.

    Attributes:
        number: from 0.
        assignment: the values that make it a trial of its own.
        cuts: where it ends early.
    """

    number: int
    assignment: Assignment
    cuts: Cuts


class Schedule:
    """The trials of one search in order.

    Args:
        config: the search's job.
        folder: of the records; None keeps them in memory only.
    """

    def __init__(self, config: JobConfig, folder: Path | None = None) -> None:
        self.config, self.folder = config, folder
        self.spaces: tuple[Space, ...] = check(config)
        self.searcher = suggestions.searcher(config, self.spaces)
        self.records: dict[int, TrialRecord] = read_records(folder) if folder else {}
        self.kept = len(self.records)  # of an earlier run
        self.asked: dict[int, Trial] = {}  # that were handed out
        self._next = self._told = 0

    @property
    def total(self) -> int:
        return self.searcher.total

    @property
    def is_over(self) -> bool:
        """Whether every trial has been handed out."""
        return self._next >= self.total

    def next(self) -> Trial | None:
        """The next trial that has no record yet; None: its turn has not come, or there is none."""
        while not self.is_over and self._may_know_enough(self._next):
            trial = self._ask(self._next)
            self._next += 1
            kept = self.records.get(trial.number)
            if kept is None:
                self.asked[trial.number] = trial
                return trial
            if kept.assignment != trial.assignment:
                raise MismatchError(
                    f"{self._path(trial.number)} is of {kept.assignment}, this search's trial is {trial.assignment}: "
                    "made by another version or seed; set overwrite=true to begin again"
                )
        return None

    def _may_know_enough(self, number: int) -> bool:
        return all(n in self.records for n in range(self._told, self._known(number)))

    def _known(self, number: int) -> int:
        """So many of the first trials are known to trial `number`."""
        return max(0, number - self.config.search.lag + 1)

    def _ask(self, number: int) -> Trial:
        for n in range(self._told, self._known(number)):
            self.searcher.tell(self.records[n])
        self._told = self._known(number)
        assignment = self.searcher.ask(number)
        steps = derive_trial(self.config, assignment).training.steps
        known = [self.records[n] for n in range(self._told)]
        return Trial(number, assignment, halving.cuts(known, self.config.search, steps))

    def finish(self, record: TrialRecord) -> None:
        """A trial is over."""
        if self.folder is not None:
            write_text(self._path(record.number), json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
        self.records[record.number] = record

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:04d}.json"


def read_records(folder: Path) -> dict[int, TrialRecord]:
    """The records that an earlier run left.

    Raises:
        ConfigError: a file that is none.
    """
    found = {}
    for path in sorted(folder.glob("[0-9]*.json")):
        try:
            record = TrialRecord.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, ValueError) as error:
            raise ConfigError(
                f"{path}: not the record of a trial; remove it to run that trial again: {error}"
            ) from error
        found[record.number] = record
    return found


def tensors_path(folder: Path, number: int) -> Path:
    """Where the trained tensors of a trial are until they are known to be of no use."""
    return folder / f"{number:04d}.safetensors"
