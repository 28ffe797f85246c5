"""The search on real Ray: workers reused and killed, trials that diverge, drivers killed, room for everything."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from test_pipeline import make_config
from tiny import PROVENANCE

from seuf_ray import patch
from seuf_ray.artifacts import AttributionReport, DataSummary, LayerScores, SearchReport, TrialRecord
from seuf_ray.checkpoint.folder import Checkpoint, resolve
from seuf_ray.config import JobConfig
from seuf_ray.errors import ConfigError
from seuf_ray.model.moe import MoEModel
from seuf_ray.outputs import claim
from seuf_ray.report import write_search_page
from seuf_ray.search.outcome import SEARCHED, finish_search, prepare_search
from seuf_ray.search.resident import Resident
from seuf_ray.search.schedule import Trial
from seuf_ray.stages.search import base_of, concurrent, search

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[1]
TRAINING = {"steps": 4, "evaluate_every": 2, "max_questions": 8, "batch_size": 8}
SPACE = {
    "targets.top_m": {"choice": [1, 2]},
    "training.learning_rate": {"loguniform": [1e-3, 2e-2]},
    "anchor.weight": {"uniform": [0.0, 2.0]},
}
Undisturbed = tuple[JobConfig, list[TrialRecord], SearchReport]


def config_for(
    folder: Path, space: dict[str, Any], cluster: dict[str, Any] | None = None, **more: Any
) -> JobConfig:
    search = {"space": space, "max_concurrent": 2, **more.pop("search", {})}
    more = {"training": TRAINING, "evaluation": {"max_questions": 8, "max_texts": 8}, **more}
    return make_config(
        folder, **more, search=search, cluster={"cpus_per_worker": 1, "max_failures": 1, **(cluster or {})}
    )


def assert_same(folder: Path, undisturbed: Undisturbed) -> None:
    """The search in `folder` ended as the undisturbed one."""
    config, trials, expected = undisturbed
    found = SearchReport.read(folder / "search.json")
    assert comparable(found.trials) == comparable(trials)
    for name in ("best", "scores", "importance"):
        assert getattr(found, name) == getattr(expected, name)
    ours, theirs = (patch.read(at / "patch")[1] for at in (folder, config.output_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def comparable(trials: list[TrialRecord]) -> list[dict[str, Any]]:
    return [trial.model_dump(exclude={"seconds", "worker"}) for trial in trials]


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Expert e of layer l has 32 l + e + 1 parts of every score: nothing here depends on who is a target."""
    checkpoint = Checkpoint(resolve("embedded:specialised"))
    parts = {layer: [32.0 * layer + e + 1 for e in range(32)] for layer in checkpoint.shape.moe_layers}
    report = AttributionReport(
        model=checkpoint.identity("embedded:specialised"),
        provenance=PROVENANCE,
        score="affinity",
        num_experts=32,
        top_k=2,
        data=DataSummary(sources=["x"], num_texts=1, num_rows=1, num_tokens=1),
        digest="0" * 64,
        layers=[
            LayerScores(layer=layer, affinity=row, router_score=row, token_share=row)
            for layer, row in parts.items()
        ],
        warnings=[],
    )
    return report.write(tmp_path_factory.mktemp("report") / "attribution.json")


def run(config: JobConfig, report_file: Path) -> tuple[list[TrialRecord], SearchReport]:
    job = prepare_search(config)
    claim(config, *SEARCHED)
    report = job.read(AttributionReport, "attribution.json", report_file)
    trials = search(job, report)
    return trials, finish_search(job, report, trials)


@pytest.fixture(scope="module")
def undisturbed(report_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Eight trials on two bases; the last ones know enough to be stopped early."""
    asked = {"num_trials": 8, "searcher": "optuna", "scheduler": "asha", "grace_steps": 2, "eta": 2}
    config = config_for(
        tmp_path_factory.mktemp("undisturbed") / "out",
        SPACE,
        inputs={"attribution": str(report_file)},
        search={**asked, "max_forget": 1.0},
    )
    return config, *run(config, report_file)


def test_a_search_reuses_its_workers_and_leaves_everything(
    undisturbed: Undisturbed, report_file: Path, tmp_path: Path
) -> None:
    """The best patch is the trial's own, bit for bit, run alone on a model of its own."""
    config, trials, found = undisturbed
    out = config.output_dir
    assert [trial.number for trial in trials] == list(range(8))
    assert {trial.status for trial in trials} <= {"finished", "stopped"}
    assert len({trial.worker for trial in trials}) == 2
    assert found == SearchReport.read(out / "search.json")
    rows = pq.read_table(out / "search.parquet").to_pylist()
    assert [row["training.learning_rate"] for row in rows] == [
        t.assignment["training.learning_rate"] for t in trials
    ]
    with (out / "search.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert len(list((out / "tensorboard").glob("*/events*"))) == 8
    assert found.best is not None and trials[found.best].status == "finished"
    assert [p.stem for p in (out / "trials").glob("*.safetensors")] == [f"{found.best:04d}"]
    manifest, tensors = patch.read(out / "patch")
    assert manifest.fingerprint == found.patches[found.best]
    expected = alone(config, report_file, trials[found.best])
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name].to(tensors[name].dtype)) for name in tensors)
    page = write_search_page(tmp_path / "page.html", found).read_text()
    assert (
        f"Trial {found.best} is the best of 8" in page and 'class="front"' in page and "thread bold" in page
    )


def alone(config: JobConfig, report_file: Path, record: TrialRecord) -> dict[str, torch.Tensor]:
    """The trial's tensors from a base that nobody used before."""
    job = prepare_search(config)
    base = base_of(job, job.read(AttributionReport, "attribution.json", report_file))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        resident = Resident(base, MoEModel(job.checkpoint))
        *_, last = resident.run(Trial(record.number, record.assignment, {}))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert last.record is not None and last.record.figures == record.figures
    return last.tensors


@pytest.mark.chaos
def test_trials_that_diverge_or_lose_their_worker_do_not_end_the_search(
    report_file: Path, tmp_path: Path
) -> None:
    """Rate 1e30 diverges; one kills its worker once and is run again; one kills every worker and is given up."""
    space = {
        "algorithm.name": {"grid": ["ga", "faulty.killed", "faulty.endless"]},
        "training.learning_rate": {"grid": [1e-3, 1e30], "when": {"algorithm.name": "ga"}},
        "targets.scope": {"grid": ["full"], "when": {"algorithm.name": "ga"}},
        "algorithm.marker": {"grid": [str(tmp_path / "killed")], "when": {"algorithm.name": "faulty.killed"}},
        "algorithm.at_call": {"grid": [3], "when": {"algorithm.name": "faulty.killed"}},
    }
    asked = {"searcher": "grid", "max_concurrent": 1}
    trials, found = run(config_for(tmp_path / "out", space, search=asked), report_file)
    by_name = {
        (t.assignment["algorithm.name"], t.assignment.get("training.learning_rate")): t for t in trials
    }
    assert by_name["ga", 1e-3].status == "finished"
    assert by_name["ga", 1e30].status == "diverged" and "non-finite" in by_name["ga", 1e30].why
    assert by_name["faulty.killed", None].status == "finished" and (tmp_path / "killed").exists()
    assert by_name["faulty.endless", None].status == "failed" and by_name["faulty.endless", None].why
    assert found.best is not None and found.scores[by_name["faulty.endless", None].number] is None


def test_workers_that_share_the_experts_are_reused_as_a_group(report_file: Path, tmp_path: Path) -> None:
    """Everything that they cache goes to files; what others have in that folder stays."""
    cluster = {"num_workers": 2, "expert_parallel_size": 2, "cpus_per_worker": 0.5}
    space, scratch = {"targets.top_m": {"grid": [1, 2]}}, tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "thesis.txt").write_text("two years of work")
    more = {
        "search": {"searcher": "grid", "max_concurrent": 1},
        "engine": {"cache_dir": str(scratch), "prefix_cache_bytes": 0},
    }
    trials, _ = run(config_for(tmp_path / "out", space, cluster, **more), report_file)
    assert [path.name for path in scratch.iterdir()] == ["thesis.txt"]
    assert [trial.status for trial in trials] == ["finished"] * 2, [trial.why for trial in trials]
    assert len({trial.worker for trial in trials}) == 1


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bad = {"targets.scope": {"choice": ["layer", "full"]}, "anchor.name": {"choice": ["kl", "onehot"]}}
    with pytest.raises(ConfigError, match=r"search\.space\.\S+: with .*'onehot'.*'full'.*anchor\.name"):
        prepare_search(config_for(tmp_path / "out", bad))
    with pytest.raises(ConfigError, match=r"search\.space\.targets\.top_m.*only 128 experts"):
        prepare_search(config_for(tmp_path / "out", {"targets.top_m": {"choice": [1, 129]}}))
    with pytest.raises(ConfigError, match=r"cluster\.zero_stage = 0"):
        prepare_search(config_for(tmp_path / "out", SPACE, {"zero_stage": 1}))
    assert not (tmp_path / "out").exists()


def test_as_many_trials_at_once_as_there_is_room_for(ray_session: None) -> None:
    """The session has 4 CPUs: 4 groups of one, 2 of two, 1 of three; one that finds no room is refused."""
    room = [
        make_config(Path("x"), cluster={"num_workers": n, "cpus_per_worker": 1}).cluster for n in (1, 2, 3, 4)
    ]
    assert [concurrent(cluster, 9) for cluster in room] == [4, 2, 1, 1]
    assert concurrent(room[0], 2) == 2
    with pytest.raises(ConfigError, match=r"num_workers = 2 of 3 CPU each .*have room for 1"):
        concurrent(make_config(Path("x"), cluster={"num_workers": 2, "cpus_per_worker": 3}).cluster, 2)


def _command(config: JobConfig, folder: Path) -> list[str]:
    """jobs/search.py's; a job file of JSON values, which are TOML's too where they are flat."""
    values = config.model_dump(
        mode="json", include={"data", "training", "evaluation", "cluster"}, exclude_unset=True
    )
    tables = [f"[{name}]\n" + _lines(table) for name, table in values.items()]
    search = config.search.model_dump(exclude={"space"}, exclude_unset=True)
    space = "\n".join(f'"{path}" = {{{_pairs(v)}}}' for path, v in config.search.space.items())
    job_file = folder.with_suffix(".toml")
    job_file.write_text("\n".join([*tables, "[search]", _lines(search), "[search.space]", space]))
    given = [f"inputs.attribution={str(config.inputs.attribution)!r}", f"output_dir={str(folder)!r}"]
    return ["jobs/search.py", str(job_file), *given]


def _lines(table: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())


def _pairs(table: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items())


@pytest.mark.chaos
@pytest.mark.slow
def test_a_killed_driver_goes_on_and_ends_with_the_undisturbed_table(
    undisturbed: Undisturbed,
    tmp_path: Path,
    kill_driver: Callable[..., None],
    run_job: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two trials at once; kill -9 when some are over, at a moment of chance; nothing that was over is run again."""
    folder = tmp_path / "killed"
    command, chance = _command(undisturbed[0], folder), random.random()
    moment = time.monotonic()

    def is_time() -> bool:
        nonlocal moment
        if len(list((folder / "trials").glob("*.json"))) < 2:
            moment = time.monotonic() + chance
        return time.monotonic() >= moment

    kill_driver(command, is_time)
    before = _stamps(folder)
    run_job(*command, "resume=true")
    assert f"{len(before)} of 8 trials are kept from the run before" in capsys.readouterr().out
    assert _stamps(folder).items() >= before.items()
    assert not (folder / "tune").exists() and not (folder / "cache").exists()
    assert_same(folder, undisturbed)
    assert json.loads((folder / "job.json").read_text())["config"]["search"]["num_trials"] == 8


def _stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_node_lost_in_the_middle_of_a_trial_changes_nothing(
    undisturbed: Undisturbed, report_file: Path, tmp_path: Path
) -> None:
    """Two nodes with a trial each; SIGKILL of one's raylet, and the other has to run all that is left alone."""
    config, folder, notes = undisturbed[0], tmp_path / "lost", tmp_path / "notes"
    notes.mkdir()
    slow = {"name": "faulty.slow", "seconds": 0.2, "notes": str(notes)}  # gradient ascent, like undisturbed
    values = {**config.model_dump(mode="json"), "algorithm": slow, "output_dir": str(folder)}
    (tmp_path / "job.json").write_text(json.dumps(values))
    script = Path(__file__).parent / "faulty" / "lost_search_node.py"
    command = [sys.executable, str(script), str(tmp_path / "job.json"), str(report_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (notes / "killed").exists() and len(list(notes.iterdir())) == 3
    assert_same(folder, undisturbed)
