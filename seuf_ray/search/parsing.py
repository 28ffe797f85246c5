"""`[search.space]` of a job file, read into spaces; what is no space, or an empty list or range, is refused.

"anchor.weight"       = {loguniform = [0.01, 10.0]}
"algorithm.name"      = {choice = ["ga", "rmu"]}
"algorithm.steering"  = {uniform = [5, 50], when = {"algorithm.name" = "rmu"}}
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from seuf_ray.errors import ConfigError, did_you_mean
from seuf_ray.search.spaces import LISTS, NAMES, RANGES, Space, asked_for, is_one_of


def parse(table: Mapping[str, Any]) -> tuple[Space, ...]:
    """The spaces of `[search.space]`, those that others depend on first.

    Raises:
        ConfigError: something that is no space, a path that is there twice, an empty or wrong list or range, or a
            condition that is cyclic, can never hold, or is not on a path with a list of values.
    """
    found = flat(table)
    if not found:
        raise ConfigError(
            'search.space: no path to search; give at least one, as in "targets.top_m" = {choice = [1, 2]}'
        )
    return _ordered([_space(path, value) for path, value in found.items()])


def flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted path -> what is written there, however the path is written.

    Raises:
        ConfigError: two paths that say something of the same place.
    """
    found: dict[str, Any] = {}
    for path, value in _flatten(table):
        if path in found:
            raise ConfigError(
                f'search.space.{path}: given twice, in quotes ("{path}") and as nested tables: keep one'
            )
        found[path] = value
    for path, part in itertools.permutations(found, 2):
        if part.startswith(f"{path}."):
            raise ConfigError(f"search.space.{part}: {path!r} sets this, too: keep one of {path!r}, {part!r}")
    return found


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
    _check_plain(f"{where}.{kind}", values)
    for value, other in itertools.combinations(values, 2):
        if is_one_of(value, [other]) or ({type(value), type(other)} == {int, float} and value == other):
            raise ConfigError(f"{where}.{kind}: {json.dumps(value)} is there more than once")
    return tuple(values)


def _check_plain(where: str, values: Sequence[Any]) -> None:
    """What a job file and the record of a trial write alike; TOML also has dates and times."""
    for value in values:
        if isinstance(value, list):
            _check_plain(where, value)
        elif not isinstance(value, str | int | float | bool):
            raise ConfigError(
                f"{where}: expected text, numbers, true, false, or lists of these (got {value!r})"
            )


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
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ConfigError(f"{where}.when.{path}: expected at least one value (got [])")
        _check_plain(f"{where}.when.{path}", values)
        yield path, tuple(values)


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
        _check_possible(ready, done)
    return tuple(done.values())


def _check_possible(space: Space, known: Mapping[str, Space]) -> None:
    for path, values in asked_for([space.path], known).items():
        if not values:
            raise ConfigError(
                f"search.space.{space.path}.when: its conditions never hold together, those of their paths included: "
                f"no value of {path} is left"
            )


def _check_conditions(space: Space, known: Mapping[str, Space]) -> None:
    where = f"search.space.{space.path}.when"
    for path, values in space.when:
        if path not in known or not known[path].is_list:
            lists = [other.path for other in known.values() if other.is_list and other is not space]
            found = "has no list of values" if path in known else "is not in search.space"
            raise ConfigError(f"{where}: {path!r} {found}; {did_you_mean(path, lists)}")
        for value in values:
            if not is_one_of(value, known[path].values):
                allowed = ", ".join(map(repr, known[path].values))
                raise ConfigError(f"{where}: {path} is never {value!r}; allowed: {allowed}")
