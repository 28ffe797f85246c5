"""Attribution on a real Ray: the same integers for any layout, engine and number of actors, whoever is killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty.attributor import KilledAttributor

import seuf_ray.stages.attribute as stage
from seuf_ray.artifacts import AttributionReport
from seuf_ray.checkpoint.folder import resolve
from seuf_ray.config import JobConfig, validate
from seuf_ray.console import Meter
from seuf_ray.embedded import texts
from seuf_ray.errors import ConfigError, DataError
from seuf_ray.job import Job, prepare_attribution
from seuf_ray.stages.attribute import attribute

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
TEXTS = texts("chemistry")[:400]


def lines(folder: Path, parts: int) -> str:
    folder.mkdir(parents=True)
    size = -(-len(TEXTS) // parts)
    for at in range(parts):
        rows = [json.dumps({"text": text}) + "\n" for text in TEXTS[at * size : (at + 1) * size]]
        (folder / f"{at}.jsonl").write_text("".join(rows))
    return str(folder)


def parquet(folder: Path, parts: int) -> str:
    folder.mkdir(parents=True)
    size = -(-len(TEXTS) // parts)
    for at in range(parts):
        mine = pa.table({"text": TEXTS[at * size : (at + 1) * size]})
        pq.write_table(mine, folder / f"{at}.parquet", row_group_size=50)
    return str(folder)


def config_of(folder: Path, forget: str, **attribution: Any) -> JobConfig:
    return validate(
        {
            "output_dir": str(folder),
            "data": {
                "forget": forget,
                "retain": "embedded:general",
                "max_rows": len(TEXTS),
                "sequence_length": 64,
            },
            "attribution": {"unit_rows": 4, "bootstrap": 8, "engine": "actors", **attribution},
            "cluster": {"cpus_per_worker": 0.5},
        }
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> AttributionReport:
    """One file, one actor."""
    folder = tmp_path_factory.mktemp("one")
    return attribute(Job(config_of(folder / "out", lines(folder / "data", 1))))


def same(found: AttributionReport, expected: AttributionReport) -> bool:
    """Every number: sources are called differently, and the engine may be another."""
    left, right = (report.model_dump(exclude={"data", "retain", "engine"}) for report in (found, expected))
    return left == right and found.data.num_tokens == expected.data.num_tokens


def test_seven_parquet_shards_on_two_actors(expected: AttributionReport, tmp_path: Path) -> None:
    report = attribute(Job(config_of(tmp_path / "out", parquet(tmp_path / "data", 7), num_actors=2)))
    assert same(report, expected)
    assert (
        report.data.num_texts == len(TEXTS)
        and report.retain is not None
        and report.retain.num_texts == len(TEXTS)
    )
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"attribution.json", "attribution.parquet", "attribution.html", "esft.json"} <= written


def test_the_streamed_engine_agrees(expected: AttributionReport, tmp_path: Path) -> None:
    """Choices to the last one. Its lone task has more threads, which may round matrix products otherwise."""
    config = config_of(tmp_path / "out", lines(tmp_path / "data", 3), engine="streamed", hidden_bytes=10**6)
    report = attribute(Job(config))
    assert report.engine == "streamed" and report.data.num_tokens == expected.data.num_tokens
    for found, row in zip(report.layers, expected.layers, strict=True):
        assert found.token_share == row.token_share
        assert found.affinity == pytest.approx(row.affinity, abs=1e-6)
        assert found.router_score == pytest.approx(row.router_score, abs=1e-6)
    assert not (tmp_path / "out" / "cache" / "hidden").exists()


def test_auto_says_why(tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path / "out", lines(tmp_path / "data", 1), engine="auto", max_tokens=500)
    report = attribute(Job(config))
    assert report.engine == "actors" and "  actors: an actor needs" in capsys.readouterr().out
    assert 500 <= report.data.num_tokens < 500 + 4 * 64


@pytest.mark.chaos
def test_an_actor_killed_on_the_way_changes_no_bit(
    expected: AttributionReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of its third unit; Ray starts it again, and the unit is run again."""
    model = tmp_path / "model"
    shutil.copytree(resolve("embedded:specialised", None), model)
    monkeypatch.setattr(stage, "Attributor", KilledAttributor)
    values = config_of(tmp_path / "out", lines(tmp_path / "data", 1)).model_dump(mode="json")
    report = attribute(Job(validate({**values, "model": {"name": str(model)}})))
    assert (model / "killed").exists()
    assert report.digest == expected.digest and report.layers == expected.layers


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_lost_node_changes_no_bit(expected: AttributionReport, tmp_path: Path) -> None:
    """Two nodes with an actor each; one goes without a word after four units, and another takes its place."""
    values = config_of(tmp_path / "out", lines(tmp_path / "data", 1), num_actors=2).model_dump(mode="json")
    (tmp_path / "job.json").write_text(json.dumps({**values, "cluster": {"cpus_per_worker": 1.0}}))
    script = Path(__file__).parent / "faulty" / "lost_node.py"
    command = [sys.executable, str(script), str(tmp_path / "job.json"), str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["nodes"] == 2 and found["actors_lost"] >= 1
    assert found["digest"] == expected.digest


def test_a_malformed_row_is_named_as_without_ray(tmp_path: Path, ray_session: None) -> None:
    source = Path(lines(tmp_path / "data", 1)) / "0.jsonl"
    rows = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*rows[:10], '{"text": 3}\n', *rows[10:]]))
    config = config_of(tmp_path / "out", str(source))
    job = prepare_attribution(config)  # reads the beginning only
    with pytest.raises(DataError, match=r"0\.jsonl:11: text must be a text.*malformed rows: 1"):
        attribute(job)
    assert not (tmp_path / "out" / "attribution.json").exists()


def test_what_can_be_told_before_ray_starts(tmp_path: Path) -> None:
    for source, words in (
        (str(tmp_path / "none.jsonl"), "no such file"),
        (str(tmp_path), "no file that can be"),
    ):
        with pytest.raises(DataError, match=words):
            prepare_attribution(config_of(tmp_path / "out", source))


def test_a_pool_that_cannot_be_placed_is_refused(tmp_path: Path, ray_session: None) -> None:
    config = config_of(tmp_path / "out", lines(tmp_path / "data", 1), num_actors=90)
    with pytest.raises(ConfigError, match="num_actors = 90 with 0.5 CPU each"):
        attribute(Job(config))


def test_the_meter() -> None:
    """300 tokens in 3 s are 100 a second; of at most 2 x 500, 700 are left: 7 s."""
    meter, endless = Meter(500, 2), Meter(None)
    meter.count(300), endless.count(300)
    assert meter.line(3.0) == "300 of at most 1,000 tokens, 100 a second, at most 7 s to go"
    assert endless.line(3.0) == "300 tokens, 100 a second"
