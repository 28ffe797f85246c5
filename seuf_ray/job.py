"""A job made ready: everything that can be wrong with a request is found here, before Ray starts or a file is written.

`prepare(config)` resolves the checkpoint, reads and tokenises the data and checks what the stages will ask for; then
`outputs.claim` takes possession of `output_dir`.
"""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from seuf_ray import artifacts
from seuf_ray.artifacts import (
    Artifact,
    AttributionReport,
    DataSummary,
    ModelIdentity,
    PatchManifest,
    UnlearningPlan,
)
from seuf_ray.checkpoint.folder import Checkpoint, resolve
from seuf_ray.config import JobConfig, derive
from seuf_ray.data.rows import (
    Row,
    idk_rows,
    padding_id,
    read_questions,
    read_texts,
    stream_texts,
    summarize,
    tokenize,
)
from seuf_ray.data.sources import Found
from seuf_ray.errors import ConfigError, said_of
from seuf_ray.feasibility import check_job
from seuf_ray.model.moe import load_tokenizer
from seuf_ray.passes import Targets
from seuf_ray.patch import MANIFEST
from seuf_ray.quiz import Quiz, make_quiz

A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class TextSet:
    """One side of the data: its rows in global order, and what the reader found."""

    rows: list[Row]
    summary: DataSummary


class Job:
    """A configuration with its checkpoint and data; cheap to make, data is read on first use."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.checkpoint = Checkpoint(resolve(config.model.name, config.model.revision))
        self.identity: ModelIdentity = self.checkpoint.identity(config.model.name, config.model.revision)
        check_job(config, self.checkpoint)
        _check_writable("output_dir", config.output_dir)
        _check_writable("engine.cache_dir", self.cache_dir)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint)

    @property
    def pad_id(self) -> int:
        """Padding is masked everywhere, so any id will do."""
        return padding_id(self.tokenizer)

    @cached_property
    def forget(self) -> TextSet:
        return self._texts("data.forget", self.config.data.forget)

    @cached_property
    def retain(self) -> TextSet:
        return self._texts("data.retain", self.config.data.retain)

    @cached_property
    def idk(self) -> list[Row]:
        """For each row of `forget` the one that an algorithm with an idk pass prefers."""
        data, (texts, _) = self.config.data, self._read("data.forget", self.config.data.forget)
        return idk_rows(texts, self.tokenizer, data.sequence_length, data.idk_answer)

    @cached_property
    def perplexity(self) -> TextSet:
        return self._texts("evaluation.perplexity", self.config.evaluation.perplexity)

    @cached_property
    def forget_quizzes(self) -> list[Quiz]:
        with said_of(*self._asked("forget", "data.forget is read as questions")):
            return [self._quiz(source) for source in self.config.forget_questions]

    @cached_property
    def utility_quizzes(self) -> list[Quiz]:
        with said_of(*self._asked("utility", "the other embedded domains are asked")):
            return [self._quiz(source) for source in self.config.utility_questions]

    def targets(self, plan: UnlearningPlan) -> Targets:
        """What the plan means to an anchor."""
        return Targets.of(plan, self.checkpoint.shape)

    @property
    def cache_dir(self) -> Path:
        """Where workers put what frozen layers computed and memory cannot hold; removed when they are done.

        In a folder that the user names it is one of this job's own: others have files there, too.
        """
        if self.config.engine.cache_dir is None:
            return self.path("cache").absolute()
        owner = {"host": socket.gethostname(), "folder": str(self.config.output_dir.absolute())}
        return self.config.engine.cache_dir.absolute() / f"seuf_ray-{artifacts.fingerprint(owner)[:12]}"

    def kept(self, kind: type[A], name: str) -> A | None:
        """An artifact that an earlier, interrupted run of this job left, when `resume` asks to go on from it."""
        return self.read(kind, name) if self.config.resume and self.path(name).exists() else None

    def read(self, kind: type[A], name: str, given: Path | None = None) -> A:
        """An artifact of this job, or of the run that `inputs` names; refused where it speaks of another model."""
        path = given or self.path(name)
        artifact = kind.read(path)
        artifact.require_model(self.identity, path)
        return artifact

    def with_config(self, config: JobConfig) -> Job:
        """Another job on the same checkpoint and data, such as a search's trial."""
        check_job(config, self.checkpoint)
        other = copy.copy(self)
        other.config = config
        return other

    def path(self, name: str) -> Path:
        """A file or folder of this job's output."""
        return self.config.output_dir / name

    def _asked(self, kind: str, default: str) -> tuple[str, str]:
        """The key that the questions of `kind` come from, and what to say of them where nobody wrote it."""
        key = f"evaluation.{kind}"
        if getattr(self.config.evaluation, kind):
            return key, ""
        own = "data.forget" if kind == "forget" else key
        return own, f"; {key} is not set, so {default}: name question sources there"

    def _texts(self, key: str, sources: Sequence[str]) -> TextSet:
        texts, found = self._read(key, sources)
        with said_of(key):
            rows = tokenize(texts, self.tokenizer, self.config.data.sequence_length)
        return TextSet(rows, summarize(sources, found, rows))

    def _read(self, key: str, sources: Sequence[str]) -> tuple[list[str], list[Found]]:
        with said_of(key):
            texts, found = zip(*(read_texts(source, self.config.data) for source in sources), strict=True)
        return [text for part in texts for text in part], list(found)

    def _quiz(self, source: str) -> Quiz:
        questions, _ = read_questions(source, self.config.data)
        evaluation = self.config.evaluation
        quiz = make_quiz(source, questions, self.tokenizer, evaluation.question_format)
        return quiz.sample(evaluation.max_questions or len(questions))


def prepare(config: JobConfig) -> Job:
    """The job with all of its inputs read and checked.

    Raises:
        ConfigError: checkpoint, data, questions, inputs or parallelism are not usable as written.
        MismatchError: an input was made for another model.
    """
    job = Job(config)
    for part in ("forget", "retain", "perplexity", "forget_quizzes", "utility_quizzes"):
        getattr(job, part)
    _check_inputs(job)
    for variant in config.compare:
        _check_variant(config, variant.name)
    return job


def prepare_attribution(config: JobConfig) -> Job:
    """The job for attribution alone, which reads its sources as a stream: only their beginnings are read here.

    Raises:
        ConfigError: the checkpoint is not usable as written, or a source does not begin with a usable text.
    """
    job = Job(config)
    for key, sources in (("data.forget", config.data.forget), ("data.retain", config.data.retain)):
        with said_of(key):
            for source in sources:
                next(iter(stream_texts(source, config.data)))
    return job


def derive_variant(config: JobConfig, name: str) -> JobConfig:
    """The configuration of one row of the comparison, in a folder of its own.

    Raises:
        ConfigError: the job with that row's overrides is not allowed; says which row it is.
    """
    variant = next(v for v in config.compare if v.name == name)
    folder = config.output_dir / "compare" / variant.slug
    own = [f"output_dir={str(folder)!r}", f"name={name!r}", "compare=[]"]
    with said_of(f"compare {name!r}"):
        found = derive(config, [*variant.overrides, *own])
    for key in ("name", "revision"):  # the row's experts are chosen from the scores of the job's model
        ours, theirs = getattr(config.model, key), getattr(found.model, key)
        if ours != theirs:
            raise ConfigError(
                f"compare {name!r}: a row shares the job's model, model.{key} = {ours!r} (got {theirs!r}): run another "
                "model as a job of its own"
            )
    return found


def _check_inputs(job: Job) -> None:
    """What `inputs` names is there and speaks of this model; found late, it would have cost an attribution."""
    inputs = job.config.inputs
    kinds: dict[str, tuple[type[Artifact], Path | None]] = {
        "attribution": (AttributionReport, inputs.attribution),
        "plan": (UnlearningPlan, inputs.plan),
        "patch": (PatchManifest, inputs.patch / MANIFEST if inputs.patch else None),
    }
    for key, (kind, path) in kinds.items():
        if path is not None:
            with said_of(f"inputs.{key}"):
                job.read(kind, path.name, path)


def _check_variant(config: JobConfig, name: str) -> None:
    """What can be wrong with a row of the comparison is found before the job's own training."""
    variant = derive_variant(config, name)
    with said_of(f"compare {name!r}"):
        Job(variant)


def _check_writable(key: str, folder: Path) -> None:
    """Whether `folder` can be made and written; nothing is made yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key} {folder} cannot be written: {there} is no folder that this user may write to"
        )
