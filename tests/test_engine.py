"""One suite for every MoE family: taps, overlay, reference passes, merging; then two processes against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run
from tasks import ascend, interrupted_rank, make_plan, random_batch, train_local, train_rank
from tiny import FAMILY_NAMES, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from seuf_ray.artifacts import Expert
from seuf_ray.checkpoint import Checkpoint, rewrite
from seuf_ray.config import ClusterConfig, TrainingConfig
from seuf_ray.deepspeed_engine import DeepSpeedEngine
from seuf_ray.engine import LocalEngine
from seuf_ray.model import MoEModel

EXPERTS: list[Expert] = [(1, 0), (2, 1), (2, 2)]  # every family has experts in layers 1 and 2


@pytest.fixture(scope="session", params=FAMILY_NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("qwen") / "model", "qwen2_moe")


def _engine(folder: Path, experts: list[Expert], **training: float) -> LocalEngine:
    checkpoint = Checkpoint(folder)
    return LocalEngine(MoEModel(checkpoint), make_plan(checkpoint, experts), TrainingConfig(**training))


def _ascend(engine: LocalEngine, steps: int = 3) -> None:
    for step in range(steps):
        ascend(engine, random_batch(seed=step))


def _plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logps_are_those_of_plain_transformers(folder: Path) -> None:
    batch = random_batch()
    forward = MoEModel(Checkpoint(folder)).forward(batch)
    logits = _plain(folder)(input_ids=batch.ids, attention_mask=batch.attention.long()).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(forward.logps[forward.mask], expected[forward.mask], atol=1e-5, rtol=1e-5)


def test_taps_are_the_routers_own_logits_and_choices(folder: Path) -> None:
    """The router module itself returns (logits, weights, index) in every family; padding is left out of the taps."""
    model, batch, seen = MoEModel(Checkpoint(folder)), random_batch(), {}
    for layer, site in model.sites.items():
        site.router.register_forward_hook(lambda _, __, out, layer=layer: seen.update({layer: out}))
    forward = model.forward(batch)
    for layer in model.shape.moe_layers:
        real = batch.attention.flatten()
        torch.testing.assert_close(forward.router_logits[layer], seen[layer][0].float()[real])
        assert torch.equal(forward.router_choices[layer], seen[layer][2][real])
        assert forward.router_logits[layer].shape == (int(real.sum()), model.shape.num_experts)


def test_a_reference_pass_is_the_original_bit_for_bit_even_after_training(folder: Path) -> None:
    original = MoEModel(Checkpoint(folder)).forward(random_batch())
    engine = _engine(folder, EXPERTS)
    _ascend(engine)
    reference = engine.forward(random_batch(), reference=True)
    assert torch.equal(reference.logps[reference.mask], original.logps[original.mask])
    for layer, logits in original.router_logits.items():
        assert torch.equal(reference.router_logits[layer], logits)


def test_an_untrained_overlay_changes_nothing(folder: Path) -> None:
    engine = _engine(folder, EXPERTS)
    on, off = engine.forward(random_batch()), engine.forward(random_batch(), reference=True)
    torch.testing.assert_close(on.logps[on.mask], off.logps[off.mask], atol=5e-6, rtol=0)


def test_the_trained_overlay_is_the_merged_checkpoint_in_plain_transformers(
    folder: Path, tmp_path: Path
) -> None:
    engine, batch = _engine(folder, EXPERTS), random_batch()
    before = engine.forward(batch)
    _ascend(engine)
    trained = engine.forward(batch)
    rewrite(Checkpoint(folder), engine.tensors(), tmp_path / "merged")
    merged = _plain(tmp_path / "merged")(input_ids=batch.ids, attention_mask=batch.attention.long()).logits
    expected = merged[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(trained.logps[trained.mask], expected[trained.mask], atol=2e-5, rtol=1e-5)
    assert (trained.logps - before.logps)[trained.mask].abs().max() > 0.1  # it did train


def test_only_the_plans_tensors_train_and_carry_state(folder: Path) -> None:
    """Weight decay of 0.5 would move every frozen tensor it could reach."""
    checkpoint = Checkpoint(folder)
    engine = _engine(folder, EXPERTS, weight_decay=0.5)
    _ascend(engine)
    plan = make_plan(checkpoint, EXPERTS)
    assert sorted(engine.tensors()) == plan.tensors
    for name in engine.model.tensor_names():
        assert torch.equal(engine.model.view(name), checkpoint.read(name)), name
    state = sum(t.numel() for s in engine.optimizer.state.values() for t in s.values() if t.ndim)
    assert state == 2 * sum(t.numel() for t in engine.tensors().values())


def test_full_training_has_a_reference_too(folder: Path) -> None:
    original = MoEModel(Checkpoint(folder)).forward(random_batch())
    engine = _engine(folder, [])
    _ascend(engine, steps=1)
    reference, current = engine.forward(random_batch(), reference=True), engine.forward(random_batch())
    assert torch.equal(reference.logps[reference.mask], original.logps[original.mask])
    assert not torch.equal(current.logps, reference.logps)


def test_gradients_are_those_of_the_same_tensors_inside_the_plain_model(folder: Path) -> None:
    """The slices of the fused parameters' gradients, from autograd through plain transformers."""
    checkpoint, batch = Checkpoint(folder), random_batch()
    engine = _engine(folder, EXPERTS)
    engine.forward(batch, grad=True).nll().backward()
    found = {
        "down": engine.trainable.experts["2_1"].down.grad,
        "router": engine.trainable.routers["2"].weight.grad,
    }
    plain = MoEModel(checkpoint)
    plain.module.requires_grad_(True)
    plain.forward(batch).nll().backward()
    block = plain.sites[2].block
    torch.testing.assert_close(found["down"], block.experts.down_proj.grad[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found["router"], block.gate.weight.grad, atol=1e-6, rtol=1e-4)


def test_bfloat16_weights_train_a_float32_overlay(qwen: Path) -> None:
    checkpoint = Checkpoint(qwen)
    engine = LocalEngine(
        MoEModel(checkpoint, torch.bfloat16),
        make_plan(checkpoint, EXPERTS),
        TrainingConfig(learning_rate=1e-3),
    )
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


@pytest.mark.timeout(300)
@pytest.mark.parametrize("zero_stage", [0])
def test_two_expert_parallel_processes_train_what_one_does(folder: Path, zero_stage: int) -> None:
    _check_two_processes(folder, {"num_workers": 2, "expert_parallel_size": 2, "zero_stage": zero_stage})


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "cluster",
    [
        {"num_workers": 2, "expert_parallel_size": 2, "zero_stage": 1},
        {"num_workers": 2, "expert_parallel_size": 2, "zero_stage": 2},
        {"num_workers": 2, "expert_parallel_size": 2, "zero_stage": 3},
        {"num_workers": 2, "expert_parallel_size": 1, "zero_stage": 0},
    ],
    ids=["zero1", "zero2", "zero3", "data-parallel"],
)
def test_the_optimizers_sharding_changes_nothing(qwen: Path, cluster: dict[str, int]) -> None:
    _check_two_processes(qwen, cluster)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_going_back_to_a_state_undoes_a_step_on_every_rank(qwen: Path, zero_stage: int) -> None:
    cluster = {"num_workers": 2, "expert_parallel_size": 2, "zero_stage": zero_stage}
    ranks = run(interrupted_rank, 2, str(qwen), EXPERTS, cluster)
    _assert_same(ranks[0], ranks[1], tolerance=0)
    _assert_same(ranks[0], train_local(qwen, EXPERTS), tolerance=3e-5)


def _check_two_processes(folder: Path, cluster: dict[str, int]) -> None:
    """Five rows fall 3 + 2 on the ranks; sums over the whole batch make that the same as one process."""
    alone = train_local(folder, EXPERTS)
    ranks = run(train_rank, 2, str(folder), EXPERTS, cluster)
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
    _assert_same(ranks[0]["tensors"], train_local(qwen, []), tolerance=3e-4)


def test_deepspeed_is_built_without_a_compiler() -> None:
    import deepspeed.ops

    from seuf_ray.deepspeed_engine import _avoid_compiling

    _avoid_compiling()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    assert DeepSpeedEngine.__mro__[1] is LocalEngine
    assert ClusterConfig(num_workers=2).uses_deepspeed
