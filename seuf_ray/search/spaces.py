"""What a search tries: dotted paths of the job file, the values of each, and when a path is there at all.

    "anchor.weight"       = {loguniform = [0.01, 10.0]}
    "algorithm.name"      = {choice = ["ga", "rmu"]}
    "algorithm.steering"  = {uniform = [5, 50], when = {"algorithm.name" = "rmu"}}

An assignment gives each path that is there a value, and the job with these overrides is a trial. Everything that is
wrong with a space is found here, before anything starts: each value, and each pair of values of two paths, makes a job.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seuf_ray.config import JobConfig, SearchConfig, derive
from seuf_ray.errors import ConfigError, did_you_mean

Assignment = dict[str, Any]  # dotted path -> value

LISTS, RANGES = ("choice", "grid"), ("uniform", "loguniform", "randint")
SEARCHABLE = ("algorithm", "anchor", "guards", "seed", "targets", "training")
FIXED = ("training.max_questions",)  # trials that answer other questions do not compare
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


def parse(table: Mapping[str, Any]) -> tuple[Space, ...]:
    """The spaces of `[search.space]`, those that others depend on first.

    Raises:
        ConfigError: something that is no space, an empty or wrong list or range, or a condition that is cyclic, can
            never hold, or is not on a path with a list of values.
    """
    flat = dict(_flatten(table))
    if not flat:
        raise ConfigError(
            'search.space: no path to search; give at least one, as in "targets.top_m" = {choice = [1, 2]}'
        )
    return _ordered([_space(path, value) for path, value in flat.items()])


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths may be written with or without quotes: unquoted ones arrive as nested tables."""
    for key, value in table.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and not {*LISTS, *RANGES, "when"} & value.keys():
            yield from _flatten(value, f"{path}.")
        else:
            yield path, value


def _space(path: str, value: Any) -> Space:
    where, kinds = f"search.space.{path}", (*LISTS, *RANGES)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a table like {{choice = [1, 2]}} (got {value!r})")
    for key in value:
        if key not in (*kinds, "when"):
            raise ConfigError(f"{where}.{key}: unknown key; {did_you_mean(key, [*kinds, 'when'])}")
    given = [kind for kind in kinds if kind in value]
    if len(given) != 1:
        raise ConfigError(
            f"{where}: expected exactly one of {', '.join(kinds)}, found {', '.join(given) or 'none'}"
        )
    kind = given[0]
    values = _list(where, kind, value[kind]) if kind in LISTS else _range(where, kind, value[kind])
    return Space(path, kind, values, tuple(_conditions(where, value.get("when", {}))))


def _list(where: str, kind: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}.{kind}: expected a list of at least one value (got {values!r})")
    keys = [json.dumps(value) for value in values]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"{where}.{kind}: {repeated[0]} is there more than once")
    return tuple(values)


def _range(where: str, kind: str, values: Any) -> tuple[Any, ...]:
    types = (int,) if kind == "randint" else (int, float)
    is_pair = isinstance(values, list) and len(values) == 2
    if not is_pair or not all(isinstance(v, types) and not isinstance(v, bool) for v in values):
        raise ConfigError(f"{where}.{kind}: expected [low, high], two {_kind_of(kind)} (got {values!r})")
    low, high = values
    if not low < high or not math.isfinite(high - low):
        raise ConfigError(f"{where}.{kind}: low must be under high, both finite (got {values!r})")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"{where}.loguniform: low must be over 0 (got {values!r})")
    return (low, high) if kind == "randint" else (float(low), float(high))


def _kind_of(kind: str) -> str:
    return "whole numbers" if kind == "randint" else "numbers"


def _conditions(where: str, when: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if not isinstance(when, Mapping):
        raise ConfigError(f'{where}.when: expected a table like {{"algorithm.name" = "rmu"}} (got {when!r})')
    for path, value in when.items():
        if isinstance(value, Mapping):
            raise ConfigError(f'{where}.when: write "{path}.{next(iter(value), "...")}" in quotes')
        yield path, tuple(value) if isinstance(value, list) else (value,)


def _ordered(spaces: Sequence[Space]) -> tuple[Space, ...]:
    """Conditions before what hangs on them, and names of plug-ins before their hyper-parameters."""
    known = {space.path: space for space in spaces}
    for space in spaces:
        _check_conditions(space, known)
    waiting = sorted(spaces, key=lambda space: space.path not in NAMES)
    done: dict[str, Space] = {}
    while waiting:
        ready = next((s for s in waiting if all(path in done for path, _ in s.when)), None)
        if ready is None:
            cycle = ", ".join(space.path for space in waiting)
            raise ConfigError(f"search.space: the conditions of {cycle} wait for each other")
        waiting.remove(ready)
        done[ready.path] = ready
    return tuple(done.values())


def _check_conditions(space: Space, known: Mapping[str, Space]) -> None:
    where = f"search.space.{space.path}.when"
    for path, values in space.when:
        if path not in known or not known[path].is_list:
            lists = [other.path for other in known.values() if other.is_list and other is not space]
            found = "has no list of values" if path in known else "is not in search.space"
            raise ConfigError(f"{where}: {path!r} {found}; {did_you_mean(path, lists)}")
        for value in values:
            if value not in known[path].values:
                allowed = ", ".join(map(repr, known[path].values))
                raise ConfigError(f"{where}: {path} is never {value!r}; allowed: {allowed}")


def is_there(space: Space, assignment: Mapping[str, Any]) -> bool:
    """Whether its conditions hold; one that hangs on a path that is not there is not there either."""
    return all(path in assignment and assignment[path] in values for path, values in space.when)


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


def check(config: JobConfig) -> tuple[Space, ...]:
    """The spaces of `config`, each value and each pair of values tried on the job.

    Raises:
        ConfigError: a path that is none or cannot be searched, or a value that it cannot have.
    """
    spaces = parse(config.search.space)
    for space in spaces:
        _check_path(space.path)
    for assignment, space in examples(spaces):
        try:
            derive_trial(config, assignment)
        except ConfigError as error:
            raise ConfigError(f"search.space.{space.path}: with {written(assignment)}: {error}") from None
    if config.search.searcher == "grid":
        grid(spaces)
    elif config.search.searcher != "random" and (grids := [s.path for s in spaces if s.kind == "grid"]):
        searcher = config.search.searcher
        raise ConfigError(
            f"search.space.{grids[0]}.grid: search.searcher = {searcher!r} takes choice in its place"
        )
    return spaces


def _check_path(path: str) -> None:
    section = path.partition(".")[0]
    if section not in JobConfig.model_fields:
        raise ConfigError(f"search.space.{path}: unknown key; {did_you_mean(section, SEARCHABLE)}")
    if section not in SEARCHABLE or path in FIXED:
        raise ConfigError(
            f"search.space.{path}: trials share this; what they may differ in is {', '.join(SEARCHABLE)} "
            f"(not {', '.join(FIXED)})"
        )


def examples(spaces: Sequence[Space]) -> Iterator[tuple[Assignment, Space]]:
    """Each example value alone, then each pair of two paths', with what their conditions ask for; and whose it is."""
    known = {space.path: space for space in spaces}
    seen: set[str] = set()
    alone = [((space, value),) for space in spaces for value in space.examples()]
    pairs = [(a[0], b[0]) for a, b in itertools.combinations(alone, 2) if a[0][0] is not b[0][0]]
    for chosen in (*alone, *pairs):
        assignment = _completed({space.path: value for space, value in chosen}, spaces, known)
        if assignment is not None and (key := json.dumps(assignment)) not in seen:
            seen.add(key)
            yield assignment, chosen[-1][0]


def _completed(wanted: Assignment, spaces: Sequence[Space], known: Mapping[str, Space]) -> Assignment | None:
    """With the first value of each condition that is not met yet; None where the wanted values exclude each other."""
    wanted, waiting = dict(wanted), list(wanted)
    while waiting:
        space = known[waiting.pop()]
        name = f"{space.path.partition('.')[0]}.name"  # of the plug-in that a hyper-parameter belongs to
        named = [(name, known[name].values)] if name in known and name != space.path else []
        for path, values in (*space.when, *named):
            if wanted.setdefault(path, values[0]) not in values:
                return None
            waiting.append(path)
    for space in spaces:  # a plug-in may need its hyper-parameters
        name = f"{space.path.partition('.')[0]}.name"
        if name in wanted and name in known and space.path not in wanted and is_there(space, wanted):
            wanted[space.path] = space.values[0]
    return {space.path: wanted[space.path] for space in spaces if space.path in wanted}


def written(assignment: Mapping[str, Any]) -> str:
    """For people: `targets.top_m = 2, anchor.weight = 0.5`."""
    return ", ".join(f"{path} = {value!r}" for path, value in assignment.items())
