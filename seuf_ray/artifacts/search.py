"""The trials of a search, and which of them are its result."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from seuf_ray.artifacts.record import Artifact, Record


class TrialPoint(Record):
    """A small evaluation of a trial."""

    step: int
    figures: dict[str, float] = Field(description="forget_accuracy, utility, drift")


class TrialRecord(Record):
    """One trial of a search, when it is over."""

    number: int
    assignment: dict[str, Any] = Field(description="dotted path -> value; what makes it a trial of its own")
    status: Literal["finished", "stopped", "diverged", "refused", "failed"] = Field(
        description="stopped: by the scheduler; refused: the job cannot be carried out with these values; failed: its "
        "workers were lost more often than cluster.max_failures allows"
    )
    why: str = Field("", description="for every status but finished")
    step: int = Field(0, description="whose tensors are the result")
    figures: dict[str, float] = Field({}, description="forget_accuracy, utility, drift of the result")
    metrics: dict[str, float] = Field({}, description="the whole small evaluation of the result")
    curve: list[TrialPoint] = Field([], description="the small evaluations on the way")
    seconds: float = Field(0.0, description="from the reset of its worker to its end")
    worker: str = Field("", description="host and number of the process that ran it")


class SearchReport(Artifact):
    """All trials of a search, and which of them are its result."""

    kind: Literal["search"] = "search"
    searcher: str
    scheduler: str
    objective: str = Field(description="in words, with its limit")
    goal: Literal["utility", "forget", "pareto"]
    limit: float | None = Field(description="max_forget of utility, min_utility of forget, none of pareto")
    space: dict[str, Any] = Field(description="dotted path -> what the job file has there")
    trials: list[TrialRecord]
    scores: list[float | None] = Field(description="of each trial; null: it came to nothing")
    best: int | None = Field(
        description="number of the trial with the highest score; of pareto that is the gap"
    )
    chosen: list[int] = Field(description="those whose patches were written: the best, or the Pareto front")
    overrides: list[str] = Field(description="the best trial as overrides of the job file")
    importance: dict[str, float] = Field(description="path -> share of the score's variance, alone")
    patches: dict[int, str] = Field(description="trial -> fingerprint of its patch")
