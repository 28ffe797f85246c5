"""The records that stages hand over: frozen JSON, fingerprinted, each naming what it was made from.

    AttributionReport -> UnlearningPlan -> PatchManifest -> EvaluationReport

`fingerprint` is the sha256 of the record's canonical JSON without that field, so an artifact edited by hand is
refused; `made_from` holds the fingerprints of the inputs, so a plan made for another model is refused too.
`python -m seuf_ray.artifacts` prints the JSON schema of all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seuf_ray.errors import ConfigError, MismatchError

Expert = tuple[int, int]  # (layer_index, expert_index), 0-based as in Hugging Face names
Score = Literal["affinity", "router_score", "token_share", "contrast"]
Selection = Literal["model", "layer", "same_layer"]
IN_PLACE = ("full", "experts", "shared")  # scopes of baselines that train what lies in the model


class Record(BaseModel):
    """Frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Statistic(Record):
    """An exact mean: what was summed, and over how many. Means of means never occur."""

    sum: float
    count: float

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else float("nan")


class ModelIdentity(Record):
    """Which checkpoint an artifact speaks of; `fingerprint` covers config, tensor names and all router weights."""

    name: str
    revision: str | None
    model_type: str
    num_parameters: int
    fingerprint: str


class DataSummary(Record):
    """What a reader found."""

    sources: list[str]
    num_texts: int
    num_rows: int
    num_tokens: int
    num_bad_rows: int = 0
    first_bad: str = Field("", description="place of the first malformed row, and what is wrong with it")


class Provenance(Record):
    """How an artifact came to be."""

    seed: int
    made_from: dict[str, str]
    packages: dict[str, str]


def provenance(seed: int, **made_from: str) -> Provenance:
    """The provenance of an artifact made now from the artifacts with these fingerprints."""
    names = ("seuf-ray", "torch", "transformers", "ray", "deepspeed", "safetensors")
    return Provenance(seed=seed, made_from=made_from, packages={name: version(name) for name in names})


class Artifact(Record):
    """A record with a file name, a fingerprint and a provenance."""

    kind: str
    model: ModelIdentity
    provenance: Provenance

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of everything else in the record."""
        return fingerprint(self.model_dump(mode="json"))

    def write(self, path: Path) -> Path:
        """Write as JSON, aside and renamed, so that a reader never sees half a file."""
        document = {**self.model_dump(mode="json"), "fingerprint": self.fingerprint}
        write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ConfigError for a missing or malformed file, MismatchError for one that was changed by hand."""
        try:
            document = dict(json.loads(path.read_text(encoding="utf-8")))
            claimed = document.pop("fingerprint")
            artifact = cls.model_validate(document)
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: no such file; run the stage that makes it first") from error
        except (ValidationError, ValueError, KeyError, AttributeError, TypeError) as error:
            why = f"no key {error}" if isinstance(error, KeyError) else error
            raise ConfigError(f"{path}: not a {cls.__name__}: {why}") from error
        if artifact.fingerprint != claimed:
            raise MismatchError(
                f"{path}: content {artifact.fingerprint[:12]} differs from its fingerprint {claimed[:12]}"
            )
        return artifact

    def require_model(self, model: ModelIdentity, path: Path) -> None:
        """Raises MismatchError where this artifact speaks of another checkpoint than `model`."""
        if self.model.fingerprint != model.fingerprint:
            raise MismatchError(
                f"{path} was made for model {self.model.name!r} ({self.model.fingerprint[:12]}), "
                f"this job's model is {model.name!r} ({model.fingerprint[:12]})"
            )


class Scores(Record):
    """Scores of one MoE layer's E experts on one set of texts (method.md section 3)."""

    affinity: list[float] = Field(description="mean over sequences of the mean gate per token (P, Eq. 2)")
    router_score: list[float] = Field(description="the same with the score before top-k choice")
    token_share: list[float] = Field(description="share of (token, k) slots that chose the expert")


class LayerScores(Scores):
    """What the report says about one MoE layer's E experts; its own scores are those on the forget set."""

    layer: int
    retain: Scores | None = Field(None, description="scores on the retain set")
    rank: list[int] = Field([], description="by the report's score, in the whole model, from 1")
    margin: list[float] = Field([], description="score less that of the next in rank; 0 for the last")
    stability: list[float] = Field(
        [], description="share of the bootstrap replicates in which the expert is among the report's targets"
    )

    def values(self, score: Score) -> list[float]:
        """The E values of a score; contrast is affinity on the forget set less that on the retain set."""
        if score != "contrast":
            found: list[float] = getattr(self, score)
            return found
        assert self.retain is not None, "a report by contrast has retain scores"
        return [f - r for f, r in zip(self.affinity, self.retain.affinity, strict=True)]


class AttributionReport(Artifact):
    """How strongly each expert of each layer carries the forget set."""

    kind: Literal["attribution"] = "attribution"
    score: Score
    num_experts: int
    top_k: int
    data: DataSummary
    retain: DataSummary | None = None
    scope: Selection = Field("layer", description="how targets are chosen where stability counts them")
    top_m: int = 1
    bootstrap: int = Field(0, description="replicates behind stability, each a resampling of the sequences")
    engine: str = Field("actors", description="what ran the model")
    digest: str = Field(description="sha256 of the integer statistics: equal for any number of actors")
    layers: list[LayerScores]
    warnings: list[str]

    def ranked(self) -> list[tuple[float, Expert]]:
        """All experts by the report's score, best first; ties go to the lower layer, then the lower index."""
        rows = [
            (value, (row.layer, index))
            for row in self.layers
            for index, value in enumerate(row.values(self.score))
        ]
        return sorted(rows, key=lambda item: (-item[0], item[1]))


class LoRA(Record):
    """Low-rank adapters in the place of the plan's tensors; the patch holds these merged."""

    rank: int
    alpha: float


class UnlearningPlan(Artifact):
    """Which tensors will train: target experts and the routers of their layers, or those of a baseline."""

    kind: Literal["plan"] = "plan"
    scope: str
    top_m: int
    experts: list[Expert]
    routers: list[int] = Field(description="layers whose router trains")
    tensors: list[str] = Field(description="checkpoint names of the trained tensors; empty means all (full)")
    num_trainable: int
    trainable_fraction: float

    lora: LoRA | None = None

    @property
    def is_full(self) -> bool:
        return self.scope == "full"

    @property
    def is_in_place(self) -> bool:
        """Whether the model's own parameters change, and not an overlay of a few experts and routers."""
        return self.scope in IN_PLACE

    @property
    def first_layer(self) -> int:
        """The lowest layer that changes; layers below it compute the same as in the original."""
        layers = [re.match(r"model\.layers\.(\d+)\.", name) for name in self.tensors]
        return min((int(found[1]) if found else 0 for found in layers), default=0)


class TensorChange(Record):
    """One tensor of a patch."""

    name: str
    dtype: str
    shape: list[int]
    base_sha256: str = Field(description="of the tensor it replaces")
    sha256: str = Field(description="of the new tensor")


class PatchManifest(Artifact):
    """What `patch.safetensors` changes, and in which checkpoint only."""

    kind: Literal["patch"] = "patch"
    plan: UnlearningPlan
    config: dict[str, Any] = Field(description="the job that trained it")
    tensors: list[TensorChange]


class EvaluationReport(Artifact):
    """Forget accuracy, utility, perplexity and routing drift, all as (sum, count)."""

    kind: Literal["evaluation"] = "evaluation"
    patch: str | None = Field(description="fingerprint of the patch evaluated, None for the original")
    forget: dict[str, Statistic] = Field(description="question source -> correct answers")
    utility: dict[str, Statistic]
    nll: Statistic = Field(description="summed token NLL on the perplexity texts")
    overlap_top1: dict[str, dict[int, Statistic]] = Field(
        description="set -> layer -> unchanged first choices"
    )
    overlap_topk: dict[str, dict[int, Statistic]] = Field(
        description="set -> layer -> unchanged top-k choices"
    )
    kl: dict[str, dict[int, Statistic]] = Field(
        description="set -> layer -> KL(original || current), nats per token"
    )

    @property
    def forget_accuracy(self) -> float:
        """Mean over sources (4 choices: chance is 0.25)."""
        return _mean([s.mean for s in self.forget.values()])

    @property
    def utility_accuracy(self) -> float:
        """Unweighted mean over the other domains."""
        return _mean([s.mean for s in self.utility.values()])

    @property
    def perplexity(self) -> float:
        return float(2.718281828459045 ** min(self.nll.mean, 700.0))

    def drift(
        self, name: Literal["overlap_top1", "overlap_topk", "kl"], data: Literal["forget", "retain"]
    ) -> float:
        """A routing figure over all MoE layers."""
        rows = getattr(self, name)[data].values()
        return float(sum(s.sum for s in rows) / max(sum(s.count for s in rows), 1))


class CurvePoint(Record):
    """A small evaluation on the way."""

    step: int
    forget_accuracy: float
    utility: float


class ComparisonRow(Record):
    """One variant of the comparison; the first row is the untouched original."""

    name: str
    forget_accuracy: float
    utility: float
    perplexity: float
    overlap_top1: float | None = Field(description="on forget tokens, all MoE layers; None for the original")
    kl: float | None = Field(description="on forget tokens, nats per token")
    trainable_fraction: float | None
    steps: int | None
    seconds: float | None = Field(description="of training, without start-up and evaluation")
    curve: list[CurvePoint]
    utility_at_forget: float | None = Field(
        description="interpolated where forget accuracy first falls to the level"
    )


class Comparison(Artifact):
    """The demo's two tables: after a fixed number of steps, and at matched forgetting."""

    kind: Literal["comparison"] = "comparison"
    forget: list[str]
    matched_level: float = 0.4
    rows: list[ComparisonRow]


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
    curve: list[TrialPoint] = []
    seconds: float = Field(0.0, description="from the reset of its worker to its end")
    worker: str = Field("", description="the process that ran it")


class SearchReport(Artifact):
    """All trials of a search, and which of them are its result."""

    kind: Literal["search"] = "search"
    searcher: str
    scheduler: str
    objective: str = Field(description="in words, with its limit")
    space: dict[str, Any] = Field(description="as the job file has it")
    trials: list[TrialRecord]
    scores: list[float | None] = Field(description="of each trial; null: it came to nothing")
    best: int | None = Field(description="number of the trial with the highest score")
    chosen: list[int] = Field(description="those whose patches were written: the best, or the Pareto front")
    overrides: list[str] = Field(description="the best trial as overrides of the job file")
    importance: dict[str, float] = Field(description="path -> share of the score's variance, alone")
    patches: dict[int, str] = Field(description="trial -> fingerprint of its patch")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def fingerprint(document: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON (sorted keys, no spaces) of `document`."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write aside, fsync, rename: the file at `path` is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


if __name__ == "__main__":
    kinds: list[type[Artifact]] = [
        AttributionReport,
        UnlearningPlan,
        PatchManifest,
        EvaluationReport,
        Comparison,
        SearchReport,
    ]
    json.dump({kind.__name__: kind.model_json_schema() for kind in kinds}, sys.stdout, indent=1)
