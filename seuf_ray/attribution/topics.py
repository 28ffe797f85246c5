"""Two attribution reports side by side: do two topics live in the same experts?

overlap      |A and B| / M of the top-M experts of each, in the whole model and in every layer
correlation  Spearman's: Pearson's of the ranks, equal values sharing the mean of their ranks
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from seuf_ray.artifacts import AttributionReport, Expert, LayerScores, Record, Score
from seuf_ray.errors import ConfigError, MismatchError


class LayerComparison(Record):
    """One layer of two reports; `layer` None is the whole model."""

    layer: int | None
    overlap: float
    correlation: float
    best: tuple[Expert, Expert]


class TopicComparison(Record):
    """What two reports of one model have in common."""

    sources: tuple[list[str], list[str]]
    score: Score
    top_m: int
    rows: list[LayerComparison]


def compare_reports(path_a: Path, path_b: Path, top_m: int | None = None) -> TopicComparison:
    """Compare two `attribution.json`.

    Args:
        top_m: M of the overlap; default: the number of experts that the model chooses for each token.

    Raises:
        ConfigError: a file is missing or no report, or the two rank by different scores.
        MismatchError: the reports are about different models.
    """
    a, b = AttributionReport.read(path_a), AttributionReport.read(path_b)
    b.require_model(a.model, path_b)
    if a.score != b.score:
        raise ConfigError(
            f"{path_a} ranks by {a.score}, {path_b} by {b.score}: run both with one attribution.score"
        )
    if [row.layer for row in a.layers] != [row.layer for row in b.layers]:
        raise MismatchError(f"{path_a} and {path_b} speak of different layers")
    m = top_m or a.top_k
    rows = [_compare(a.layers, b.layers, a.score, m, None)]
    rows += [_compare([x], [y], a.score, m, x.layer) for x, y in zip(a.layers, b.layers, strict=True)]
    return TopicComparison(sources=(a.data.sources, b.data.sources), score=a.score, top_m=m, rows=rows)


def _compare(
    a: list[LayerScores], b: list[LayerScores], score: Score, m: int, layer: int | None
) -> LayerComparison:
    places = [(row.layer, index) for row in a for index in range(len(row.affinity))]
    left, right = (np.array([v for row in rows for v in row.values(score)]) for rows in (a, b))
    top = [np.argsort(-values, kind="stable")[:m] for values in (left, right)]
    return LayerComparison(
        layer=layer,
        overlap=len(set(top[0].tolist()) & set(top[1].tolist())) / min(m, len(places)),
        correlation=spearman(left, right),
        best=(places[top[0][0]], places[top[1][0]]),
    )


def spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Rank correlation of two vectors, in [-1, 1]; 0 where one of them is constant."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else 0.0


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: npt.NDArray[np.float64] = (ends - (counts + 1) / 2)[inverse]
    return means
