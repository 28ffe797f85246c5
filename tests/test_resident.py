"""A trial on a base that others used before it ends with the bits that it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_baselines import report_of
from test_unlearning import TASK
from tiny import save_tiny
from torch import Tensor

from seuf_ray.artifacts import TrialRecord
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import validate
from seuf_ray.model.moe import MoEModel
from seuf_ray.model.spans import ConstantCache
from seuf_ray.search.resident import Base, Resident
from seuf_ray.search.schedule import Trial

OVERLAY = {"targets.top_m": 2, "training.learning_rate": 1e-2}
NPO = {"algorithm.name": "npo", "targets.scope": "layer", "anchor.weight": 0.5}
FULL = {"targets.scope": "full", "training.learning_rate": 1e-3}
LORA = {"targets.scope": "lora", "targets.lora_rank": 2}
NULLSPACE = {"anchor.name": "nullspace", "targets.experts": [[2, 3]], "targets.scope": "explicit"}
ALL = [OVERLAY, NPO, FULL, LORA, NULLSPACE]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_of(save_tiny(tmp_path_factory.mktemp("qwen"), "qwen2_moe"))


def base_of(folder: Path, **more: Any) -> Base:
    training = {"steps": 4, "evaluate_every": 2, "batch_size": 4, "learning_rate": 5e-3}
    config = validate({"output_dir": "x", "training": training} | more)
    return Base(config, folder, report_of(Checkpoint(folder)), TASK)


def fresh(base: Base) -> Resident:
    return Resident(base, MoEModel(Checkpoint(base.folder)))


def result(
    resident: Resident, assignment: dict[str, Any], **cuts: Any
) -> tuple[TrialRecord, dict[str, Tensor]]:
    moments = list(resident.run(Trial(0, assignment, cuts.get("cuts", {}))))
    assert moments[-1].record is not None
    return moments[-1].record, moments[-1].tensors


def same(record: TrialRecord, other: TrialRecord) -> bool:
    return record.model_copy(update={"seconds": 0.0}) == other.model_copy(update={"seconds": 0.0})


@pytest.fixture(scope="module")
def alone(base: Base) -> list[tuple[TrialRecord, dict[str, Tensor]]]:
    return [result(fresh(base), assignment) for assignment in ALL]


@pytest.mark.parametrize("before", ALL)
def test_a_trial_after_another_has_the_bits_of_a_fresh_process(
    base: Base, alone: list[tuple[TrialRecord, dict[str, Tensor]]], before: dict[str, Any]
) -> None:
    """Overlay, another overlay, in place, adapters, constrained routers: each after each, tensors and figures."""
    resident = fresh(base)
    untouched = {name: resident.model.view(name).clone() for name in resident.model.tensor_names()}
    modules = [type(module) for module in resident.model.module.modules()]
    for assignment, (expected_record, expected) in zip(ALL, alone, strict=True):
        result(resident, before)
        found, tensors = result(resident, assignment)
        assert found.status == "finished" and same(found, expected_record), assignment
        assert tensors.keys() == expected.keys() and tensors
        assert all(torch.equal(tensors[name], expected[name]) for name in expected), assignment
    assert all(torch.equal(resident.model.view(name), value) for name, value in untouched.items())
    assert [type(module) for module in resident.model.module.modules()] == modules
    assert not any(parameter.requires_grad for parameter in resident.model.module.parameters())


def test_what_is_constant_is_computed_once_for_all_trials(base: Base) -> None:
    resident = fresh(base)
    result(resident, NULLSPACE)
    misses = resident.cache.misses
    result(resident, {**NULLSPACE, "training.learning_rate": 1e-4, "algorithm.name": "gdiff"})
    assert (
        resident.cache.misses - misses < misses // 2
    )  # what only gdiff reads, and nothing of what was there


def test_a_trial_given_up_half_way_leaves_nothing_behind(base: Base) -> None:
    resident = fresh(base)
    for assignment in (OVERLAY, FULL, LORA):
        moments = resident.run(Trial(0, assignment, {}))
        next(moments)
        moments.close()
    found, expected = result(resident, OVERLAY)[1], result(fresh(base), OVERLAY)[1]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_trial_that_diverges_is_reported_and_the_next_one_is_as_alone(base: Base) -> None:
    resident = fresh(base)
    record, _ = result(resident, {"targets.scope": "full", "training.learning_rate": 1e30})
    assert record.status == "diverged" and record.why
    again, _ = result(resident, FULL)
    assert same(again, result(fresh(base), FULL)[0])


def test_a_trial_that_cannot_be_carried_out_is_refused_and_the_search_goes_on(base: Base) -> None:
    resident = fresh(base)
    record, tensors = result(resident, {"targets.scope": "layer", "targets.top_m": 9})
    assert record.status == "refused" and "targets.top_m = 9" in record.why and not tensors
    assert result(resident, OVERLAY)[0].status == "finished"


def test_a_cut_ends_a_trial_with_the_tensors_of_that_step(base: Base) -> None:
    cut, tensors = result(fresh(base), OVERLAY, cuts={2: 2.0})
    assert cut.status == "stopped" and cut.step == 2 and "under the cut" in cut.why
    _, expected = result(fresh(base), {**OVERLAY, "training.steps": 2})
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_full_cache_makes_room_for_another_trial_but_not_within_one() -> None:
    """Room for two: the third of a trial is not kept; the next trial's first takes the place of the oldest."""
    cache, value = ConstantCache(2 * 4), {"x": torch.zeros(1)}
    device = torch.device("cpu")
    for key in "abc":
        cache.put(key, value)
    assert [cache.get(key, device) is not None for key in "abc"] == [True, True, False]
    cache.renew()
    assert cache.get("b", device) is not None
    cache.put("d", value)
    assert [cache.get(key, device) is not None for key in "abd"] == [False, True, True]
    assert cache.used == 8


def _two_ranks(folder: str) -> list[tuple[TrialRecord, dict[str, Tensor]]]:
    """Experts sharded once, then trial after trial; the first one comes again at the end."""
    from seuf_ray.engine.deepspeed_engine import owned_experts, shard_experts

    torch.set_num_threads(1)
    base = base_of(Path(folder), cluster={"num_workers": 2, "expert_parallel_size": 2})
    checkpoint = Checkpoint(base.folder)
    model = MoEModel(checkpoint, owned=owned_experts(8, torch.distributed.get_rank(), 2))
    shard_experts(model, 2)
    resident = Resident(base, model)
    return [result(resident, assignment) for assignment in (OVERLAY, NPO, OVERLAY)]


def test_two_ranks_that_share_the_experts_run_trial_after_trial(base: Base, two_processes: Any) -> None:
    """Both ranks agree, the first trial comes out the same after another, and one process finds the same tensors."""
    first, second = two_processes(_two_ranks, str(base.folder))
    for (record, tensors), (other, others) in zip(first, second, strict=True):
        assert record.figures == other.figures
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert first[0][0].curve == first[2][0].curve
    assert all(torch.equal(first[0][1][name], first[2][1][name]) for name in first[0][1])
    for (_, tensors), assignment in zip(first, (OVERLAY, NPO), strict=False):
        alone = result(fresh(base), assignment)[1]
        for name, tensor in alone.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)
