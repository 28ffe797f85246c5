"""One suite for every MoE family: taps, overlay, reference passes, merging; then two processes against one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distributed import run
from tasks import (
    ascend,
    broken_rank,
    each,
    interrupted_rank,
    make_plan,
    random_batch,
    train_local,
    train_rank,
)
from tiny import FAMILY_NAMES, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from seuf_ray.artifacts import Expert
from seuf_ray.checkpoint.folder import Checkpoint, rewrite
from seuf_ray.config import ClusterConfig, TrainingConfig
from seuf_ray.engine import LocalEngine
from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine
from seuf_ray.model.moe import MoEModel
from seuf_ray.passes import Batch

EXPERTS: list[Expert] = [(1, 0), (2, 1), (2, 2)]  # every family has experts in layers 1 and 2
DTYPES = (torch.float32, torch.bfloat16)
Folders = dict[tuple[str, torch.dtype], Path]


@dataclass(frozen=True)
class Case:
    """A tiny model, stored and run in `dtype`."""

    folder: Path
    dtype: torch.dtype

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    def model(self) -> MoEModel:
        return MoEModel(self.checkpoint, self.dtype)

    def engine(self, experts: list[Expert], **training: float) -> LocalEngine:
        return LocalEngine(self.model(), make_plan(self.checkpoint, experts), TrainingConfig(**training))

    def close(self, fine: float, coarse: float) -> float:
        """A tolerance: `fine` in float32, `coarse` in bfloat16, whose rounding is 2**16 times as coarse."""
        return fine if self.dtype == torch.float32 else coarse


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("families")
    cases = [(family, dtype) for family in FAMILY_NAMES for dtype in DTYPES]
    return {(name, dtype): save_tiny(root / f"{name}_{dtype}", name, dtype=dtype) for name, dtype in cases}


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=FAMILY_NAMES)
def case(request: pytest.FixtureRequest, folders: Folders, dtype: torch.dtype) -> Case:
    return Case(folders[request.param, dtype], dtype)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("qwen") / "model", "qwen2_moe")


def _ascend(engine: LocalEngine, steps: int = 3) -> None:
    for step in range(steps):
        ascend(engine, random_batch(seed=step))


def _plain_logps(case: Case, folder: Path, batch: Batch) -> Tensor:
    """(B, T-1) of a checkpoint in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=case.dtype).eval()
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.attention.long()).logits
    return logits[:, :-1].float().log_softmax(-1).gather(2, batch.ids[:, 1:, None]).squeeze(2)


def test_logps_are_those_of_plain_transformers(case: Case) -> None:
    batch = random_batch()
    forward = case.model().forward(batch)
    expected = _plain_logps(case, case.folder, batch)
    torch.testing.assert_close(forward.logps[forward.mask], expected[forward.mask], atol=1e-5, rtol=1e-5)


def test_taps_are_the_routers_own_logits_and_choices(case: Case) -> None:
    """The router module itself returns (logits, weights, index) in every family; padding is left out of the taps."""
    model, batch, seen = case.model(), random_batch(), {}
    for layer, site in model.sites.items():
        site.router.register_forward_hook(lambda _, __, out, layer=layer: seen.update({layer: out}))
    forward = model.forward(batch)
    for layer in model.shape.moe_layers:
        real = batch.attention.flatten()
        torch.testing.assert_close(forward.router_logits[layer], seen[layer][0].float()[real])
        assert torch.equal(forward.router_choices[layer], seen[layer][2][real])
        assert forward.router_logits[layer].shape == (int(real.sum()), model.shape.num_experts)


def test_a_reference_pass_is_the_original_bit_for_bit_even_after_training(case: Case) -> None:
    original = case.model().forward(random_batch())
    engine = case.engine(EXPERTS)
    _ascend(engine)
    reference = engine.forward(random_batch(), reference=True)
    assert torch.equal(reference.logps[reference.mask], original.logps[original.mask])
    for layer, logits in original.router_logits.items():
        assert torch.equal(reference.router_logits[layer], logits)


def test_an_untrained_overlay_changes_nothing(case: Case) -> None:
    engine = case.engine(EXPERTS)
    on, off = engine.forward(random_batch()), engine.forward(random_batch(), reference=True)
    torch.testing.assert_close(on.logps[on.mask], off.logps[off.mask], atol=case.close(5e-6, 0.05), rtol=0)


def test_the_trained_overlay_is_the_merged_checkpoint_in_plain_transformers(
    case: Case, tmp_path: Path
) -> None:
    engine, batch = case.engine(EXPERTS), random_batch()
    before = engine.forward(batch)
    _ascend(engine)
    trained = engine.forward(batch)
    stored = {name: tensor.to(case.dtype) for name, tensor in engine.tensors().items()}
    rewrite(case.checkpoint, stored, tmp_path / "merged")
    expected = _plain_logps(case, tmp_path / "merged", batch)
    tolerance = case.close(3e-5, 0.05)
    torch.testing.assert_close(trained.logps[trained.mask], expected[trained.mask], atol=tolerance, rtol=0)
    assert (trained.logps - before.logps)[trained.mask].abs().max() > 0.1  # it did train


LARGER = {  # what larger members of a family have and the tiny ones here do not
    "DeepSeek-V2": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "q_lora_rank": 16},
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "q_lora_rank": 16, "first_k_dense_replace": 1},
    ),
    "tied embeddings": ("qwen2_moe", {"tie_word_embeddings": True}),
    "normalised gates": ("qwen2_moe", {"norm_topk_prob": True}),
}


@pytest.mark.timeout(300)
def test_larger_members_of_a_family_train_the_same_on_one_and_two_processes_and_merge(tmp_path: Path) -> None:
    cluster = {"num_workers": 2, "expert_parallel_size": 2}
    cases = [
        Case(save_tiny(tmp_path / name, family, **changes), torch.float32)
        for name, (family, changes) in LARGER.items()
    ]
    ranks = run(each, 2, train_rank, [(str(case.folder), EXPERTS, cluster) for case in cases])
    for case, *found in zip(cases, *ranks, strict=True):
        _check_two_processes(case.folder, found)
        test_taps_are_the_routers_own_logits_and_choices(case)
        test_the_trained_overlay_is_the_merged_checkpoint_in_plain_transformers(case, case.folder)


def test_only_the_plans_tensors_train_and_carry_state(case: Case) -> None:
    """Weight decay of 0.5 would move every frozen tensor it could reach."""
    engine = case.engine(EXPERTS, weight_decay=0.5)
    _ascend(engine)
    plan = make_plan(case.checkpoint, EXPERTS)
    assert sorted(engine.tensors()) == plan.tensors
    for name in engine.model.tensor_names():
        assert torch.equal(engine.model.view(name), case.checkpoint.read(name)), name
    state = sum(t.numel() for s in engine.optimizer.state.values() for t in s.values() if t.ndim)
    assert state == 2 * sum(t.numel() for t in engine.tensors().values())


def test_full_training_has_a_reference_too(case: Case) -> None:
    original = case.model().forward(random_batch())
    engine = case.engine([])
    _ascend(engine, steps=1)
    reference, current = engine.forward(random_batch(), reference=True), engine.forward(random_batch())
    assert torch.equal(reference.logps[reference.mask], original.logps[original.mask])
    assert not torch.equal(current.logps, reference.logps)


def test_gradients_are_those_of_the_same_tensors_inside_the_plain_model(case: Case) -> None:
    """The slices of the fused parameters' gradients, from autograd through plain transformers."""
    batch, engine = random_batch(), case.engine(EXPERTS)
    engine.forward(batch, grad=True).nll().backward()
    plain = case.model()
    plain.module.requires_grad_(True)
    plain.forward(batch).nll().backward()
    block = plain.sites[2].block
    for found, expected in (
        (engine.trainable.experts["2_1"].down.grad, block.experts.down_proj.grad[1]),
        (engine.trainable.routers["2"].weight.grad, block.gate.weight.grad),
    ):
        error = (found - expected.float()).norm() / expected.float().norm()
        assert found.dtype == torch.float32 and error < case.close(1e-4, 0.03)


def test_bfloat16_weights_train_a_float32_overlay(qwen: Path) -> None:
    engine = Case(qwen, torch.bfloat16).engine(EXPERTS, learning_rate=1e-3)
    start = engine.forward(random_batch()).nll()
    _ascend(engine)
    assert all(tensor.dtype == torch.float32 for tensor in engine.tensors().values())
    assert engine.forward(random_batch()).nll() > start


def test_an_expert_without_tokens_is_no_problem(qwen: Path) -> None:
    """One short row cannot reach all eight experts of a layer."""
    checkpoint = Checkpoint(qwen)
    model = MoEModel(checkpoint)
    batch = random_batch(rows=1, length=4)
    idle = set(range(8)) - set(model.forward(batch).router_choices[1].flatten().tolist())
    engine = LocalEngine(model, make_plan(checkpoint, [(1, min(idle))]), TrainingConfig())
    assert ascend(engine, batch) >= 0


@pytest.fixture(scope="session")
def trained_in_pairs(folders: Folders) -> dict[tuple[str, torch.dtype], list[dict]]:
    """Every family in both dtypes, trained by one pair of processes: starting a pair takes longer than training."""
    cluster = {"num_workers": 2, "expert_parallel_size": 2}
    jobs = [(str(folder), EXPERTS, cluster, dtype) for (_, dtype), folder in folders.items()]
    ranks = run(each, 2, train_rank, jobs)
    return {key: [rank[at] for rank in ranks] for at, key in enumerate(folders)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_two_expert_parallel_processes_train_what_one_does(
    family: str, folders: Folders, trained_in_pairs: dict[tuple[str, torch.dtype], list[dict]]
) -> None:
    _check_two_processes(folders[family, torch.float32], trained_in_pairs[family, torch.float32])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_two_processes_in_bfloat16_are_as_near_to_float32_as_one_is(
    family: str, folders: Folders, trained_in_pairs: dict[tuple[str, torch.dtype], list[dict]]
) -> None:
    """Adam takes a whole step along a gradient near zero, whose sign is rounding: single numbers may differ by as much
    as they moved. So the yardstick is how far one process in bfloat16 ends from itself in float32: two roundings that
    have nothing to do with each other lie sqrt(2) of it apart, and twice is allowed."""
    _check_bfloat16(folders[family, torch.bfloat16], trained_in_pairs[family, torch.bfloat16])


def _check_bfloat16(folder: Path, ranks: list[dict]) -> None:
    one, fine = (train_local(folder, EXPERTS, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    found = ranks[0]["tensors"]
    _assert_same(found, ranks[1]["tensors"], tolerance=0)
    yardstick = _distance(one, fine)
    assert _distance(found, one) < 2 * yardstick
    assert _distance(found, fine) < 2 * yardstick
    moved = _distance(fine, train_local(folder, EXPERTS, steps=0))
    assert max(yardstick, _distance(found, fine)) < 0.5 * moved
    for rank in ranks:
        assert rank["frozen"] == {torch.bfloat16}
        assert rank["trained"] == rank["state"] == {torch.float32}


def _distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((left[name] - right[name]).double().square().sum()) for name in left))


SHARDINGS = {
    "zero1": {"num_workers": 2, "expert_parallel_size": 2, "zero_stage": 1},
    "zero2": {"num_workers": 2, "expert_parallel_size": 2, "zero_stage": 2},
    "zero3": {"num_workers": 2, "expert_parallel_size": 2, "zero_stage": 3},
    "data-parallel": {"num_workers": 2, "expert_parallel_size": 1},
}


@pytest.fixture(scope="session")
def sharded_in_pairs(folders: Folders) -> dict[tuple[str, torch.dtype], list[dict]]:
    keys = [(name, dtype) for name in SHARDINGS for dtype in DTYPES]
    jobs = [(str(folders["qwen2_moe", dtype]), EXPERTS, SHARDINGS[name], dtype) for name, dtype in keys]
    ranks = run(each, 2, train_rank, jobs)
    return {key: [rank[at] for rank in ranks] for at, key in enumerate(keys)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_optimizers_sharding_changes_nothing(
    sharding: str,
    dtype: torch.dtype,
    folders: Folders,
    sharded_in_pairs: dict[tuple[str, torch.dtype], list[dict]],
) -> None:
    """In bfloat16: the model's weights alone; what trains, its masters and moments are float32 at every stage."""
    check = _check_two_processes if dtype == torch.float32 else _check_bfloat16
    check(folders["qwen2_moe", dtype], sharded_in_pairs[sharding, dtype])


@pytest.mark.timeout(300)
def test_going_back_to_a_state_undoes_a_step_on_every_rank(qwen: Path) -> None:
    stages = [{"num_workers": 2, "expert_parallel_size": 2, "zero_stage": stage} for stage in range(4)]
    ranks = run(each, 2, interrupted_rank, [(str(qwen), EXPERTS, cluster) for cluster in stages])
    expected = train_local(qwen, EXPERTS)
    for first, second in zip(*ranks, strict=True):
        _assert_same(first, second, tolerance=0)
        _assert_same(first, expected, tolerance=3e-5)


@pytest.mark.timeout(300)
def test_a_gradient_that_breaks_on_one_rank_steps_nothing_and_all_ranks_say_where(qwen: Path) -> None:
    stages = [{"num_workers": 2, "expert_parallel_size": 2, "zero_stage": stage} for stage in range(4)]
    for found in zip(*run(each, 2, broken_rank, [(str(qwen), [(1, 0)], s) for s in stages]), strict=True):
        assert found[0] == found[1] or all(math.isnan(norm) for norm, *_ in found)
        for norm, names, is_unchanged in found:
            assert not math.isfinite(norm) and is_unchanged
            assert "routers.1.weight" in names and names == found[0][1]


def _check_two_processes(folder: Path, ranks: list[dict]) -> None:
    """Five rows fall 3 + 2 on the ranks; sums over the whole batch make that the same as one process."""
    alone = train_local(folder, EXPERTS)
    _assert_same(ranks[0]["tensors"], ranks[1]["tensors"], tolerance=0)
    _assert_same(ranks[0]["tensors"], alone, tolerance=3e-5)
    original = MoEModel(Checkpoint(folder))
    batch = random_batch(seed=2)
    mask = batch.counted[[0, 2, 4], 1:]
    expected = original.forward(batch).logps[[0, 2, 4]]
    torch.testing.assert_close(ranks[0]["reference"][-1][mask], expected[mask], atol=2e-6, rtol=1e-6)


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_full_training_is_plain_data_parallel(qwen: Path) -> None:
    """AutoEP shards what the baseline trains, so that combination is refused in job.py; here: both ranks agree."""
    cluster = {"num_workers": 2, "expert_parallel_size": 1}
    ranks = run(train_rank, 2, str(qwen), [], cluster)
    _assert_same(ranks[0]["tensors"], ranks[1]["tensors"], tolerance=0)
    _assert_same(ranks[0]["tensors"], train_local(qwen, []), tolerance=1e-3)  # of 3e-2 that they moved


def test_deepspeed_is_built_without_a_compiler() -> None:
    import deepspeed.ops

    from seuf_ray.engine.deepspeed_engine import _avoid_compiling

    _avoid_compiling()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    assert DeepSpeedEngine.__mro__[1] is LocalEngine
    assert ClusterConfig(num_workers=2).uses_deepspeed
