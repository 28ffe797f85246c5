"""Two reports side by side, and a report as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import records

from seuf_ray.artifacts import AttributionReport, LayerScores
from seuf_ray.attribution.table import write_table
from seuf_ray.attribution.topics import compare_reports, spearman
from seuf_ray.errors import ConfigError, MismatchError


def saved(path: Path, rows: list[list[float]], **changes: Any) -> Path:
    report = records.attribution()
    layers = [
        LayerScores(layer=i + 1, affinity=row, router_score=row, token_share=row)
        for i, row in enumerate(rows)
    ]
    return AttributionReport(**{**dict(report), "layers": layers, **changes}).write(path)


def test_overlap_and_correlation_by_hand(tmp_path: Path) -> None:
    """Top-2 of A: layer 1 {0, 1}, layer 2 {3, 2}; of B: layer 1 {0, 3}, layer 2 {3, 2}. Over the model A has (1, 0),
    (1, 1) and B (2, 3), (1, 0). Layer 1: ranks 3 2 1 0 against 3 0 1 2, d = 0 2 0 2: rho = 1 - 6 * 8 / 60 = .2;
    layer 2 has equal ranks: 1.
    """
    a = saved(tmp_path / "a.json", [[0.9, 0.8, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    b = saved(tmp_path / "b.json", [[0.7, 0.0, 0.1, 0.6], [0.1, 0.2, 0.3, 0.9]])
    model, first, second = compare_reports(a, b, top_m=2).rows
    assert (first.layer, first.overlap, first.correlation) == (1, 0.5, pytest.approx(0.2))
    assert (second.layer, second.overlap, second.correlation) == (2, 1.0, pytest.approx(1.0))
    assert (model.layer, model.overlap, model.best) == (None, 0.5, ((1, 0), (2, 3)))
    assert compare_reports(a, b).top_m == 2  # the model's top-k


def test_equal_values_share_their_rank() -> None:
    """Ranks (0, 1.5, 1.5, 3) against (0, 1, 2, 3): 4.5 / sqrt(4.5 * 5) = .9487; a constant has no correlation."""
    found = spearman(np.array([1.0, 2.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert found == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman(np.ones(3), np.arange(3.0)) == 0.0


def test_reports_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    rows = [[0.1, 0.2]]
    one = saved(tmp_path / "one.json", rows)
    other_score = saved(tmp_path / "score.json", rows, score="token_share")
    other_model = records.MODEL.model_copy(update={"fingerprint": "0" * 64})
    elsewhere = saved(tmp_path / "model.json", rows, model=other_model)
    with pytest.raises(ConfigError, match="ranks by affinity.*by token_share"):
        compare_reports(one, other_score)
    with pytest.raises(MismatchError, match="was made for model"):
        compare_reports(one, elsewhere)
    with pytest.raises(ConfigError, match="no such file"):
        compare_reports(one, tmp_path / "none.json")


def test_the_table_has_every_score_of_every_expert(tmp_path: Path) -> None:
    report = records.attribution(3, 8)
    table = pq.read_table(write_table(tmp_path / "attribution.parquet", report))
    assert table.num_rows == 24 and table.column("rank").to_pylist() == list(range(1, 25))
    rows = table.to_pylist()
    assert [(row["affinity"], (row["layer"], row["expert"])) for row in rows] == report.ranked()
    best, layer = rows[0], next(row for row in report.layers if row.layer == rows[0]["layer"])
    assert layer.retain is not None
    assert best["retain_affinity"] == layer.retain.affinity[best["expert"]]
    assert best["contrast"] == best["affinity"] - best["retain_affinity"] and best["stability"] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["attribution.parquet"]
