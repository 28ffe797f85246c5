"""Which experts carry a set of texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from seuf_ray.artifacts.record import Artifact, DataSummary, Record

Expert = tuple[int, int]  # (layer_index, expert_index), 0-based as in Hugging Face names
Score = Literal["affinity", "router_score", "token_share", "contrast"]
Selection = Literal["model", "layer", "same_layer"]


class Scores(Record):
    """Scores of one MoE layer's E experts on one set of texts."""

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
