"""Reports as tables: of an attribution one row for each expert, best first; of a search one row for each trial."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from seuf_ray.artifacts import AttributionReport, LayerScores, SearchReport

SCORES = ("affinity", "router_score", "token_share")


def table_of(report: AttributionReport) -> pa.Table:
    """Columns layer, expert, rank, margin, stability, every score, `retain_` and every score, contrast."""
    rows = [row for layer in report.layers for row in _rows(layer)]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["rank"]))


def write_table(path: Path, report: AttributionReport) -> Path:
    """Write the table aside and rename, so that a reader never sees half of it."""
    _write(path, table_of(report))
    return path


def write_trials(parquet: Path, csv: Path, report: SearchReport) -> None:
    """All trials of a search, in order, for tools and for people."""
    table = trials_table(report)
    _write(parquet, table)
    _write(csv, table)


def trials_table(report: SearchReport) -> pa.Table:
    """Columns number, status, score, every path of the space, every figure and metric of the result, and its cost."""
    paths = sorted({path for trial in report.trials for path in trial.assignment})
    metrics = sorted({name for trial in report.trials for name in trial.metrics})
    columns: dict[str, list[Any]] = {
        "number": [trial.number for trial in report.trials],
        "status": [trial.status for trial in report.trials],
        "score": report.scores,
        "is_chosen": [trial.number in report.chosen for trial in report.trials],
    }
    columns |= {path: _column([trial.assignment.get(path) for trial in report.trials]) for path in paths}
    columns |= {name: [trial.metrics.get(name) for trial in report.trials] for name in metrics}
    columns["drift"] = [trial.figures.get("drift") for trial in report.trials]
    columns |= {
        name: [getattr(trial, name) for trial in report.trials] for name in ("step", "seconds", "why")
    }
    return pa.table(columns)


def _column(values: list[Any]) -> list[Any]:
    """Values of one type as they are, others (lists, or numbers beside words) as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {str, bool}):
        return values
    return [None if value is None else json.dumps(value) for value in values]


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, aside)
    else:
        pq.write_table(table, aside)
    aside.replace(path)


def _rows(layer: LayerScores) -> Iterator[dict[str, Any]]:
    contrast = layer.values("contrast") if layer.retain else None
    for index in range(len(layer.affinity)):
        row: dict[str, Any] = {"layer": layer.layer, "expert": index}
        row |= {"rank": layer.rank[index], "margin": layer.margin[index]}
        row["stability"] = layer.stability[index] if layer.stability else None
        row |= {name: getattr(layer, name)[index] for name in SCORES}
        row |= {f"retain_{name}": getattr(layer.retain, name)[index] for name in SCORES if layer.retain}
        yield row | {"contrast": contrast[index] if contrast else None}
