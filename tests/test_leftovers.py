"""Before and beside the trials of a search, without Ray: whose files are removed, and whether there is room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from test_baselines import report_of
from tiny import save_tiny

from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import ClusterConfig, validate
from seuf_ray.console import show_room
from seuf_ray.errors import ConfigError
from seuf_ray.job import Job
from seuf_ray.outputs import clear_cache
from seuf_ray.search.outcome import sweep
from seuf_ray.search.resident import Base, process_name
from seuf_ray.stages.search import concurrent
from seuf_ray.stages.session import require
from seuf_ray.stages.trials import spill_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen2_moe")


def make_job(tiny: Path, folder: Path, **more: Any) -> Job:
    return Job(validate({"output_dir": str(folder), "model": {"name": str(tiny)}, **more}))


@pytest.fixture
def strangers(tmp_path: Path) -> Iterator[Path]:
    """A folder with others' files, some called as ours were; they are there afterwards."""
    folder = tmp_path / "scratch"
    files = [
        folder / name for name in ("thesis.txt", "hidden/0.pt", "rank_0/0.safetensors", "1234/0.safetensors")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("two years of work")
    yield folder
    assert [file.read_text() for file in files] == ["two years of work"] * len(files)
    assert len(list(folder.iterdir())) == 4


def test_only_a_folder_of_our_own_is_removed_from_the_cache_folder(
    tiny: Path, tmp_path: Path, strangers: Path
) -> None:
    job = make_job(tiny, tmp_path / "out", engine={"cache_dir": str(strangers)})
    other = make_job(tiny, tmp_path / "other", engine={"cache_dir": str(strangers)})
    assert job.cache_dir.parent == strangers and job.cache_dir != other.cache_dir
    for one in (job, other):
        one.cache_dir.mkdir()
        (one.cache_dir / "0.safetensors").touch()
    clear_cache(job)
    assert not job.cache_dir.exists() and (other.cache_dir / "0.safetensors").exists()
    sweep(other)


def test_what_a_killed_search_left_is_swept_and_what_it_finished_stays(tiny: Path, tmp_path: Path) -> None:
    job = make_job(tiny, tmp_path / "out")
    left = (
        "trials/.0002.safetensors.77",
        "trials/.0002.json.78",
        "tune/x/y",
        "cache/host-1-ab/0.safetensors",
    )
    kept = ("trials/0001.json", "trials/0001.safetensors", "tensorboard/0001/events", "job.json")
    for name in (*left, *kept):
        job.path(name).parent.mkdir(parents=True, exist_ok=True)
        job.path(name).touch()
    sweep(job)
    assert all(job.path(name).exists() for name in kept)
    assert {p.name for p in job.path("").iterdir()} == {"trials", "tensorboard", "job.json"}
    assert {p.name for p in job.path("trials").iterdir()} == {"0001.json", "0001.safetensors"}
    sweep(make_job(tiny, tmp_path / "never begun"))


def test_two_processes_with_one_number_spill_into_two_folders(tiny: Path, tmp_path: Path) -> None:
    """Hosts may share a disk and give the same numbers."""
    base = Base(validate({"output_dir": "x"}), tiny, report_of(Checkpoint(tiny)), None, tmp_path)  # type: ignore[arg-type]
    first, second = spill_folder(base), spill_folder(base)
    assert first != second and first is not None and first.parent == tmp_path
    assert first.name.startswith(process_name().replace(":", "-"))


# -- room --------------------------------------------------------------------------------------------------------


def test_a_worker_that_no_node_takes_is_refused_though_their_sum_would(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Two nodes of 2 CPUs."""
    state = [{"Alive": alive, "Resources": {"CPU": 2.0}} for alive in (True, True, False)]
    monkeypatch.setattr(ray, "nodes", lambda: state)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.delenv("RAY_CLUSTER_AUTOSCALES", raising=False)
    impossible = ClusterConfig(cpus_per_worker=3)
    for ask in (lambda: require(impossible), lambda: concurrent(impossible, 8)):
        with pytest.raises(ConfigError, match=r"3 CPU each .*\(2 of 2 CPU\) have room for 0"):
            ask()
    require(ClusterConfig(cpus_per_worker=2))
    assert concurrent(ClusterConfig(cpus_per_worker=2), 8) == 2
    show_room(2, 8)
    assert "room for 2 of 8 trials at once" in capsys.readouterr().out
    monkeypatch.setenv("RAY_CLUSTER_AUTOSCALES", "1")
    require(impossible)
    assert concurrent(impossible, 8) == 8
