"""An attribution report as a table: one row for each expert, best first; `attribution.parquet`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from seuf_ray.artifacts import AttributionReport, LayerScores

SCORES = ("affinity", "router_score", "token_share")


def table_of(report: AttributionReport) -> pa.Table:
    """Columns layer, expert, rank, margin, stability, every score, `retain_` and every score, contrast."""
    rows = [row for layer in report.layers for row in _rows(layer)]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["rank"]))


def write_table(path: Path, report: AttributionReport) -> Path:
    """Write the table aside and rename, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table_of(report), aside)
    aside.replace(path)
    return path


def _rows(layer: LayerScores) -> Iterator[dict[str, Any]]:
    contrast = layer.values("contrast") if layer.retain else None
    for index in range(len(layer.affinity)):
        row: dict[str, Any] = {"layer": layer.layer, "expert": index}
        row |= {"rank": layer.rank[index], "margin": layer.margin[index]}
        row["stability"] = layer.stability[index] if layer.stability else None
        row |= {name: getattr(layer, name)[index] for name in SCORES}
        row |= {f"retain_{name}": getattr(layer.retain, name)[index] for name in SCORES if layer.retain}
        yield row | {"contrast": contrast[index] if contrast else None}
