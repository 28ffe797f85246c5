"""What a search tries: dotted paths of the job file, the values of each, and when a path is there at all.

An assignment gives each path that is there a value, and the job with these overrides is a trial.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seuf_ray.config import JobConfig, SearchConfig, derive
from seuf_ray.errors import ConfigError

Assignment = dict[str, Any]  # dotted path -> value

LISTS, RANGES = ("choice", "grid"), ("uniform", "loguniform", "randint")
NAMES = ("algorithm.name", "anchor.name")  # set first: they say which hyper-parameters there are


@dataclass(frozen=True)
class Space:
    """The values of one path.

    Attributes:
        path: dotted.
        kind: choice and grid list their values; uniform, loguniform and randint have the bounds, both inclusive.
        values: the list, or (low, high).
        when: (path, values) that must all hold for this path to be there.
    """

    path: str
    kind: str
    values: tuple[Any, ...]
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @property
    def is_list(self) -> bool:
        return self.kind in LISTS

    def draw(self, rng: random.Random) -> Any:
        """One value at random."""
        if self.is_list:
            return rng.choice(self.values)
        low, high = self.values
        if self.kind == "randint":
            return rng.randint(low, high)
        if self.kind == "uniform":
            return rng.uniform(low, high)
        return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)

    def examples(self) -> tuple[Any, ...]:
        """Every value of a list; both ends of a range, and what is typical between them."""
        if self.is_list or self.kind == "randint":
            return self.values
        low, high = self.values
        return low, low + (high - low) * 0.381966, high


def is_one_of(value: Any, values: Iterable[Any]) -> bool:
    """By their JSON: to Python 1, 1.0 and true are equal, to a job they are not."""
    return json.dumps(value) in map(json.dumps, values)


def is_there(space: Space, assignment: Mapping[str, Any]) -> bool:
    """Whether its conditions hold; one that hangs on a path that is not there is not there either."""
    return all(path in assignment and is_one_of(assignment[path], values) for path, values in space.when)


def asked_for(paths: Iterable[str], known: Mapping[str, Space]) -> dict[str, tuple[Any, ...]]:
    """The values that are left to other paths where all of `paths` are there; none: that is never so.

    Each condition is about one path's value, so what all of them leave together is what they have in common: those of
    `paths`, and of whatever these conditions need to be there.
    """
    left: dict[str, tuple[Any, ...]] = {}
    waiting = list(paths)
    while waiting:
        for path, values in known[waiting.pop()].when:
            if path not in left:
                waiting.append(path)
            left[path] = tuple(v for v in left.get(path, known[path].values) if is_one_of(v, values))
    return left


def sample(spaces: Iterable[Space], rng: random.Random, fixed: Mapping[str, Any] | None = None) -> Assignment:
    """A value for each path that is there; `fixed` ones are taken as they are."""
    found: Assignment = {}
    for space in spaces:
        if is_there(space, found):
            found[space.path] = fixed[space.path] if fixed and space.path in fixed else space.draw(rng)
    return found


def grid(spaces: Sequence[Space]) -> list[Assignment]:
    """Every combination of the lists' values, the first path's values changing last.

    Raises:
        ConfigError: a range, which has no end of values.
    """
    for space in spaces:
        if not space.is_list:
            raise ConfigError(
                f"search.space.{space.path}.{space.kind}: search.searcher = 'grid' needs a list: write choice or grid"
            )
    found: list[Assignment] = [{}]
    for space in spaces:
        found = [
            {**before, **more}
            for before in found
            for more in ([{space.path: v} for v in space.values] if is_there(space, before) else [{}])
        ]
    return found


def crossed(spaces: Sequence[Space]) -> list[Assignment]:
    """Every combination of what is a grid, for searchers that draw the rest."""
    return grid([space for space in spaces if space.kind == "grid"])


def overrides(assignment: Mapping[str, Any]) -> list[str]:
    """The assignment as overrides of a job; those that choose a plug-in come first."""
    paths = sorted(assignment, key=lambda path: (path not in NAMES, list(assignment).index(path)))
    return [f"{path}={json.dumps(assignment[path])}" for path in paths]


def derive_trial(config: JobConfig, assignment: Mapping[str, Any]) -> JobConfig:
    """The job that a trial is: that of the search, with an assignment and without what else it lists."""
    alone = config.model_copy(
        update={"search": SearchConfig(), "compare": [], "resume": False, "overwrite": False}
    )
    return derive(alone, overrides(assignment))


def written(assignment: Mapping[str, Any]) -> str:
    """For people: `targets.top_m = 2, anchor.weight = 0.5`."""
    return ", ".join(f"{path} = {value!r}" for path, value in assignment.items())
