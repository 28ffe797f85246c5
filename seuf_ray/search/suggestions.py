"""Which assignment is trial number N: listed beforehand, or suggested by optuna from the results that are known.

A searcher is asked for numbers in order and told results in order, and draws from a generator made anew for each
number. So what it suggests depends on seed, number and those results alone, and a search that goes on after its driver
was killed asks and tells all of it again and comes to the same state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, Protocol

from seuf_ray.artifacts import TrialRecord
from seuf_ray.config import JobConfig, SearchConfig
from seuf_ray.errors import ConfigError
from seuf_ray.search import objectives, spaces
from seuf_ray.search.spaces import Assignment, Space


class Searcher(Protocol):
    """Assignments by number."""

    total: int  # trials of the whole search

    def ask(self, number: int) -> Assignment:
        """The assignment of trial `number`; asked for once each, from 0 on."""

    def tell(self, trial: TrialRecord) -> None:
        """A result; told once each, from trial 0 on."""


def searcher(config: JobConfig, found: Sequence[Space]) -> Searcher:
    """The searcher that the job names.

    Raises:
        ConfigError: it needs a package that is not installed, or a list where a range is.
    """
    if config.search.searcher in ("optuna", "nsga2"):
        return Suggested(found, config.search, config.seed)
    if config.search.searcher == "grid":
        return Listed(spaces.grid(found))
    crossed = spaces.crossed(found)
    numbers = range(len(crossed) * config.search.num_trials)
    return Listed(
        [
            spaces.sample(found, random.Random(f"{config.seed}/{n}"), crossed[n // config.search.num_trials])
            for n in numbers
        ]
    )


class Listed:
    """Known beforehand; results change nothing."""

    def __init__(self, assignments: Sequence[Assignment]) -> None:
        self.assignments, self.total = assignments, len(assignments)

    def ask(self, number: int) -> Assignment:
        return self.assignments[number]

    def tell(self, trial: TrialRecord) -> None:
        """Nothing to learn."""


class Suggested:
    """Optuna's TPE or NSGA-II over the spaces, conditions included.

    Trials that were asked for and not told count as running, so TPE stays away from what is being tried already.
    """

    def __init__(self, found: Sequence[Space], config: SearchConfig, seed: int) -> None:
        self.spaces, self.config, self.seed, self.total = found, config, seed, config.num_trials
        self._optuna = _import_optuna()
        several = config.objective == "pareto"
        directions = list(objectives.DIRECTIONS) if several else ["maximize"]
        self._study = self._optuna.create_study(directions=directions)
        self._open: dict[int, Any] = {}

    def ask(self, number: int) -> Assignment:
        self._study.sampler = self._sampler(number)
        trial = self._study.ask()
        assert trial.number == number, "trials are asked for in order"
        self._open[number] = trial
        found: Assignment = {}
        for space in self.spaces:
            if spaces.is_there(space, found):
                found[space.path] = _suggest(trial, space)
        return found

    def tell(self, trial: TrialRecord) -> None:
        self._study.tell(self._open.pop(trial.number), objectives.values(trial, self.config))

    def _sampler(self, number: int) -> Any:
        digest = hashlib.sha256(f"{self.seed}/{number}".encode()).digest()
        seed, samplers = int.from_bytes(digest[:4], "big"), self._optuna.samplers
        if self.config.searcher == "nsga2":
            return samplers.NSGAIISampler(population_size=self._population(), seed=seed)
        startup = max(4, min(10, self.total // 4))
        return samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)

    def _population(self) -> int:
        """Small enough for some generations."""
        return max(4, min(50, self.total // 4))


def _suggest(trial: Any, space: Space) -> Any:
    if space.is_list:  # by index: optuna's choices are of plain types, ours may be lists
        return space.values[trial.suggest_categorical(space.path, list(range(len(space.values))))]
    low, high = space.values
    if space.kind == "randint":
        return trial.suggest_int(space.path, low, high)
    return trial.suggest_float(space.path, low, high, log=space.kind == "loguniform")


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "search.searcher = 'optuna' and 'nsga2' need the extra 'search': pip install 'seuf-ray[search]'"
        ) from error
    import warnings

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # constant_liar
    return optuna
