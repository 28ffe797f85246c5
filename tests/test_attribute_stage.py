"""Attribution on a real Ray: the same integers for any layout, engine and number of actors, whoever is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty.attributor import killed_attributor

import seuf_ray.stages.attribute as stage
from seuf_ray.artifacts import AttributionReport
from seuf_ray.config import JobConfig, validate
from seuf_ray.console import Meter, show_layer
from seuf_ray.embedded import texts
from seuf_ray.errors import ConfigError, DataError
from seuf_ray.job import Job, prepare_attribution
from seuf_ray.outputs import ATTRIBUTION
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
def one_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return lines(tmp_path_factory.mktemp("data") / "one", 1)


@pytest.fixture(scope="module")
def expected(one_file: str, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> AttributionReport:
    """One file, one actor."""
    return attribute(Job(config_of(tmp_path_factory.mktemp("one"), one_file)))


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


def assert_same_file(folder: Path, expected: AttributionReport, scratch: Path) -> None:
    """Byte for byte, provenance and all: the data, the model and the packages are the same."""
    assert (folder / ATTRIBUTION).read_bytes() == expected.write(scratch / "expected.json").read_bytes()


@pytest.mark.chaos
def test_an_actor_killed_on_the_way_changes_no_byte(
    expected: AttributionReport, one_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of its third unit; Ray starts it again, and the unit is run again."""
    monkeypatch.setattr(stage, "Attributor", killed_attributor(tmp_path / "killed"))
    attribute(Job(config_of(tmp_path / "out", one_file)))
    assert (tmp_path / "killed").exists()
    assert_same_file(tmp_path / "out", expected, tmp_path)


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_lost_node_changes_no_byte(expected: AttributionReport, one_file: str, tmp_path: Path) -> None:
    """Two nodes with an actor each; one goes without a word after four units, and another takes its place."""
    values = config_of(tmp_path / "out", one_file, num_actors=2).model_dump(mode="json")
    (tmp_path / "job.json").write_text(json.dumps({**values, "cluster": {"cpus_per_worker": 1.0}}))
    script = Path(__file__).parent / "faulty" / "lost_node.py"
    command = [sys.executable, str(script), str(tmp_path / "job.json"), str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["nodes"] == 2 and found["actors_lost"] >= 1
    assert_same_file(tmp_path / "out", expected, tmp_path)


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
    """One set: 100 tokens, then 300 in 3 s, half of all: 100 a second, of 800 in all 400 are left: 4 s. The time before
    the first result does not count. Two sets: 400 / .5 + 100 / .25 = 1,200 in all, with at most 500 of each 900;
    where one cannot tell, its limit is what is known.
    """
    meter = Meter()
    meter.count(100, "forget", 0.125), meter.count(300, "forget", 0.375)
    assert meter.line(3.0) == (
        "[##########----------]  50%  400 of about 800 tokens, 100 a second, 4 s to go"
    )
    for most, words in ((None, "500 of about 1,200"), (500, "500 of about 900 tokens")):
        both = Meter(most, 2)
        both.count(400, "forget", 0.5), both.count(100, "retain", 0.25)
        assert words in both.line(1.0)
    for most, words in ((None, "400 tokens, 100 a second"), (500, "400 of about 1,000 tokens")):
        half_known = Meter(most, 2)
        half_known.count(100, "forget", 0.5), half_known.count(300, "retain", 0.0)
        assert words in half_known.line(3.0)


def test_a_layer_of_a_streamed_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """One of four in 2 s: 6 s for the others, and 1,000 tokens through the whole in 8 s are 125 a second."""
    show_layer(1, 4, 2.0, 1000, 2**29)
    assert capsys.readouterr().out == (
        "  [#####---------------]  25%  layer 1 of 4, 0.50 GiB read, 125 tokens a second, 6 s to go\n"
    )
