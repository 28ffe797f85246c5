"""Whether a job can be searched, found before anything starts: every value, and every pair, has to make a job."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from seuf_ray import plugins
from seuf_ray.config import JobConfig, SearchConfig
from seuf_ray.errors import ConfigError, did_you_mean
from seuf_ray.search.parsing import parse
from seuf_ray.search.spaces import (
    Assignment,
    Space,
    asked_for,
    crossed,
    derive_trial,
    grid,
    is_there,
    written,
)

SEARCHABLE = ("algorithm", "anchor", "guards", "seed", "targets", "training")
FIXED = ("training.max_questions",)  # trials that answer other questions do not compare
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing"}


def check(config: JobConfig) -> tuple[Space, ...]:
    """The spaces of `config`, each value and each pair of values tried on the job.

    Raises:
        ConfigError: a path that is none or cannot be searched, a value that it cannot have, or a searcher or scheduler
            that could do nothing with these.
    """
    spaces = parse(config.search.space)
    for space in spaces:
        _check_path(space.path)
    steps = []
    for assignment, space in examples(spaces):
        with blamed_on(space, assignment):
            trial = _derive(config, assignment, spaces)
            _check_types(trial, assignment)
        steps.append(trial.training.steps)
    _check_searcher(config.search, spaces)
    _check_scheduler(config.search, spaces, max(steps))
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


@contextmanager
def blamed_on(space: Space, assignment: Assignment) -> Iterator[None]:
    """A mistake inside is that of a trial: of the path that it names, else of `space`."""
    try:
        yield
    except ConfigError as error:
        named = (path for path in assignment if str(error).startswith((f"{path}:", f"{path}.", f"{path} ")))
        path = next(named, space.path)
        raise ConfigError(f"search.space.{path}: with {written(assignment)}: {error}") from None


def _derive(config: JobConfig, assignment: Assignment, spaces: Sequence[Space]) -> JobConfig:
    """The trial; a hyper-parameter that only some of the plug-ins have is refused with what restricts it to them."""
    try:
        return derive_trial(config, assignment)
    except ConfigError as error:
        raise ConfigError(f"{error}{_restriction(str(error), spaces)}") from None


def _restriction(error: str, spaces: Sequence[Space]) -> str:
    known = {space.path: space for space in spaces}
    for space in spaces:
        section, _, key = space.path.partition(".")
        chooser = known.get(f"{section}.name")
        if chooser is None or not chooser.is_list or not error.startswith(f"{space.path}: unknown key"):
            continue
        names = [name for name in chooser.values if key in plugins.find(f"{section}s", name).model_fields]
        if names:
            value = json.dumps(names if len(names) > 1 else names[0])
            return f'; restrict it with when = {{"{chooser.path}" = {value}}}'
    return ""


def _check_types(trial: JobConfig, assignment: Assignment) -> None:
    """Pydantic takes "1" and true for 1; a table of trials that says so would not be what was run."""
    values = trial.model_dump()
    for path, given in assignment.items():
        found: Any = values
        for key in path.split("."):
            found = found[key]
        if not _is_same(given, found):
            kind = KINDS.get(type(found), "a list")
            raise ConfigError(f"{path}: expected {kind} (got {given!r}, which would be taken as {found!r})")


def _is_same(given: Any, found: Any) -> bool:
    """Whether the job has the value as it was given; a whole number may stand for any number."""
    if isinstance(found, list | tuple):
        return isinstance(given, list) and len(given) == len(found) and all(map(_is_same, given, found))
    if type(found) not in KINDS:
        return True  # a file, or a plug-in by its name: there is no other way to write these
    is_number = type(given) is int and type(found) is float
    return (type(given) is type(found) or is_number) and bool(given == found)


def _check_searcher(config: SearchConfig, spaces: Sequence[Space]) -> None:
    """Whether the searcher can do with these kinds of spaces what they say."""
    if config.searcher == "grid":
        grid(spaces)
        return
    known = {space.path: space for space in spaces}
    for space in (space for space in spaces if space.kind == "grid"):
        where = f"search.space.{space.path}.grid"
        if config.searcher != "random":
            raise ConfigError(f"{where}: search.searcher = {config.searcher!r} takes choice in its place")
        for path, _ in space.when:
            if known[path].kind != "grid":
                raise ConfigError(
                    f"{where}: it hangs on {path}, which is drawn, so there are no points to cross it with: "
                    f"write grid there, too, or choice here"
                )


def _check_scheduler(config: SearchConfig, spaces: Sequence[Space], most_steps: int) -> None:
    """Whether it could ever stop a trial."""
    if config.scheduler == "none":
        return
    if config.grace_steps >= most_steps:
        raise ConfigError(
            f"search.grace_steps = {config.grace_steps}: asha could stop no trial, as the longest has training.steps = "
            f"{most_steps}; allowed: less than that"
        )
    points = {"grid": grid, "random": crossed}.get(config.searcher)
    draws = 1 if config.searcher == "grid" else config.num_trials
    config.require_results(draws * len(points(spaces)) if points else draws)


def examples(spaces: Sequence[Space]) -> Iterator[tuple[Assignment, Space]]:
    """Trials, each whole: of each example value, then of each pair of two paths' that may meet; and whose it is."""
    seen: set[str] = set()
    alone = [((space, value),) for space in spaces for value in space.examples()]
    pairs = [(a[0], b[0]) for a, b in itertools.combinations(alone, 2) if a[0][0] is not b[0][0]]
    for chosen in (*alone, *pairs):
        assignment = _completed({space.path: value for space, value in chosen}, spaces)
        if assignment is not None and (key := json.dumps(assignment)) not in seen:
            seen.add(key)
            yield assignment, chosen[-1][0]


def _completed(wanted: Assignment, spaces: Sequence[Space]) -> Assignment | None:
    """The trial with `wanted` and else first values, of those that `wanted` needs; None where it is in no trial."""
    left = asked_for(wanted, {space.path: space for space in spaces})
    found: Assignment = {}
    for space in spaces:
        if is_there(space, found):
            first = (left.get(space.path) or space.values)[0]
            found[space.path] = wanted.get(space.path, first)
    return found if wanted.keys() <= found.keys() else None
