"""Attribution by workers that share one copy of the experts: the same numbers as by one process with all of them."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from distributed import run
from ray.util.queue import Queue
from tasks import each
from tiny import FAMILY_NAMES, VOCAB, save_tiny

from seuf_ray.artifacts import AttributionReport
from seuf_ray.attribution.bootstrap import Bootstrap
from seuf_ray.attribution.results import results_in_step
from seuf_ray.attribution.statistics import RoutingStatistics, unit_statistics
from seuf_ray.attribution.units import ACCOUNT, Record, account, unit_batch
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import validate
from seuf_ray.errors import DataError
from seuf_ray.job import Job
from seuf_ray.model.moe import MoEModel
from seuf_ray.outputs import ATTRIBUTION
from seuf_ray.routing import FIXED_POINT
from seuf_ray.stages.attribute import attribute
from seuf_ray.stages.attribute_parallel import GROUP, _readable, through_group

BOOTSTRAPS = {"forget": Bootstrap(seed=1, replicates=4), "retain": Bootstrap()}
UNITS = 6  # of them the last is empty, as the unit of a chunk without usable texts is
# Which units each rank has: as even as can be, all on one, and none at all on both.
SHARES = {"even": ([0, 2, 4], [1, 3, 5]), "one-sided": ([], [5, 3, 1, 0, 4, 2]), "empty": ([], [])}
Found = dict[int, dict[str, Any]]  # unit -> its result record


def record(at: int) -> dict[str, Any]:
    """Unit `at`: sequences of 3 to 9 tokens, packed two to a row."""
    dice = random.Random(at)
    lengths = [dice.randint(3, 9) for _ in range(2 * at + 3)] if at < UNITS - 1 else []
    accounts = {"chunk": 0, "unit": at, "is_last_unit": at == UNITS - 1, "is_last_chunk": True}
    return {
        **accounts,
        "data": "retain" if at == 2 else "forget",
        "num_texts": len(lengths),
        "num_bad": 0,
        "first_bad": "",
        "share": 1 / UNITS,
        "tokens": [dice.randrange(3, VOCAB) for _ in range(sum(lengths))],
        "lengths": lengths,
        "indices": [100 * at + number for number in range(len(lengths))],
        "rows": [number // 2 for number in range(len(lengths))],
    }


def results_of_rank(folder: str, shares: tuple[list[int], list[int]]) -> Found:
    from seuf_ray.engine.deepspeed_engine import owned_experts, shard_experts

    model = MoEModel(Checkpoint(Path(folder)), owned=owned_experts(8, dist.get_rank(), 2))
    shard_experts(model, 2)
    mine = map(record, shares[dist.get_rank()])
    return {result["unit"]: result for result in results_in_step(model, mine, BOOTSTRAPS, pad_id=0)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny(root / family, family) for family in FAMILY_NAMES}


@pytest.fixture(scope="module")
def found(folders: dict[str, Path]) -> dict[tuple[str, str], Found]:
    """Of every family and share, by one pair of processes."""
    keys = [(family, share) for family in folders for share in SHARES]
    jobs = [(str(folders[family]), SHARES[share]) for family, share in keys]
    ranks = run(each, 2, results_of_rank, jobs)
    return {key: ranks[0][at] | ranks[1][at] for at, key in enumerate(keys)}


def one_process(folder: Path) -> Iterator[RoutingStatistics]:
    model = MoEModel(Checkpoint(folder))
    for at in range(UNITS - 1):
        batch, sequences = unit_batch(record(at), BOOTSTRAPS[record(at)["data"]], pad_id=0)
        with torch.no_grad():
            yield unit_statistics(*model.route(batch), sequences, model.shape)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_two_ranks_find_what_one_process_finds(
    family: str, folders: dict[str, Path], found: dict[tuple[str, str], Found]
) -> None:
    """Counts exactly, mean scores to 1e-6: an expert's output is rounded differently where it is added up."""
    for at, expected in enumerate(one_process(folders[family])):
        statistics = RoutingStatistics.from_record(found[family, "even"][at])
        assert (statistics.slots == expected.slots).all()
        assert (statistics.counts == expected.counts).all()
        assert statistics.num_sequences == expected.num_sequences == 2 * at + 3
        assert statistics.num_tokens == expected.num_tokens
        for name in ("affinity", "router_score", "replicates"):
            error = abs(getattr(statistics, name) - getattr(expected, name)).max(initial=0) / FIXED_POINT
            assert error < 1e-6 * expected.num_sequences, name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_unit_comes_once_with_its_account_wherever_it_is_run(
    family: str, found: dict[tuple[str, str], Found]
) -> None:
    """On the CPU not a bit depends on what runs beside a unit: units of its size or not, or fillers."""
    assert found[family, "empty"] == {}
    for share in ("even", "one-sided"):
        assert sorted(found[family, share]) == list(range(UNITS))
        assert [account(found[family, share][at]) for at in range(UNITS)] == [
            account(record(at)) for at in range(UNITS)
        ]
    assert found[family, "even"] == found[family, "one-sided"]


def test_an_empty_unit_counts_nothing(found: dict[tuple[str, str], Found]) -> None:
    result = found["qwen2_moe", "even"][UNITS - 1]
    empty = RoutingStatistics.from_record(result)
    assert result.keys() >= set(ACCOUNT)
    assert empty.digest() == RoutingStatistics.zero(3, 8, BOOTSTRAPS["forget"]).digest()


# -- on Ray ------------------------------------------------------------------------------------------------------


def job_in(folder: Path, engine: str) -> Job:
    return Job(
        validate(
            {
                "output_dir": str(folder / engine),
                "data": {"max_rows": 150, "sequence_length": 32},
                "attribution": {"unit_rows": 4, "engine": engine},
                "cluster": {"num_workers": 2, "expert_parallel_size": 2, "cpus_per_worker": 0.5},
            }
        )
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> AttributionReport:
    """The embedded model by two workers with half of its experts each."""
    job = job_in(tmp_path_factory.mktemp("undisturbed"), "expert_parallel")
    report = attribute(job)
    assert not job.path(GROUP).exists()
    return report


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_group_finds_what_actors_find(undisturbed: AttributionReport, tmp_path: Path) -> None:
    """Counts exactly, scores to 1e-6, and so every rank and stability."""
    expected = attribute(job_in(tmp_path, "actors"))
    assert (undisturbed.data, undisturbed.retain) == (expected.data, expected.retain)
    for found, row in zip(undisturbed.layers, expected.layers, strict=True):
        assert (found.token_share, found.retain.token_share) == (row.token_share, row.retain.token_share)
        assert (found.rank, found.stability) == (row.rank, row.stability)
        for name in ("affinity", "router_score"):
            assert getattr(found, name) == pytest.approx(getattr(row, name), abs=1e-6)
            assert getattr(found.retain, name) == pytest.approx(getattr(row.retain, name), abs=1e-6)


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_a_killed_worker_changes_no_byte(
    undisturbed: AttributionReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 after the first result: the group starts again, and what had come is not counted a second time."""
    come: list[tuple[str, int, int]] = []

    def killing(*arguments: Any) -> Iterator[Record]:
        for result in through_group(*arguments):
            if not come:
                os.kill(_workers()[0], signal.SIGKILL)
            come.append((result["data"], result["chunk"], result["unit"]))
            yield result

    monkeypatch.setattr("seuf_ray.stages.attribute.through_group", killing)
    job = job_in(tmp_path, "expert_parallel")
    attribute(job)
    assert len(come) > len(set(come))
    assert job.path(ATTRIBUTION).read_bytes() == undisturbed.write(tmp_path / "expected.json").read_bytes()


def _workers() -> list[int]:
    """Processes of this session's worker group."""
    mine = psutil.Process().children(recursive=True)
    return [process.pid for process in mine if "RayTrainWorker" in "".join(process.cmdline())]


def _refuse() -> None:
    raise DataError("texts.jsonl:3: no column 'text'")


@pytest.mark.timeout(120)
def test_a_mistake_in_the_data_is_told_once_and_ends_the_units(ray_session: None) -> None:
    """It reaches a worker as Ray's own error, from the task that reads; the group would only meet it again."""

    def units() -> Iterator[Record]:
        yield record(0)
        ray.get(ray.remote(_refuse).remote())

    queue = Queue(actor_options={"num_cpus": 0})
    assert [unit["unit"] for unit in _readable(units(), queue)] == [0]
    told = queue.get(timeout=30)
    assert type(told) is DataError and str(told) == "texts.jsonl:3: no column 'text'"
    queue.shutdown()
