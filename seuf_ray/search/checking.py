"""Whether a job can be searched, found before anything starts: every value, and every pair, has to make a job."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

from seuf_ray.config import JobConfig
from seuf_ray.errors import ConfigError, did_you_mean
from seuf_ray.search.parsing import parse
from seuf_ray.search.spaces import Assignment, Space, derive_trial, grid, is_there, written

SEARCHABLE = ("algorithm", "anchor", "guards", "seed", "targets", "training")
FIXED = ("training.max_questions",)  # trials that answer other questions do not compare


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
