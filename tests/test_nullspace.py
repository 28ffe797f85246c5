"""The null-space anchor: its directions by hand, and routers that keep to them, trained by one process or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import make_plan
from tiny import save_tiny
from torch import Tensor, nn

from seuf_ray import config, unlearning
from seuf_ray.anchors.nullspace import NullSpaceAnchor
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import ClusterConfig, JobConfig
from seuf_ray.constraint import router_moments
from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Row
from seuf_ray.engine import LocalEngine
from seuf_ray.errors import ConfigError
from seuf_ray.job import Job
from seuf_ray.model.moe import MoEModel
from seuf_ray.monitor import Task
from seuf_ray.passes import Targets
from seuf_ray.plugins import Reads
from seuf_ray.projection import Projection

EXPERTS = [(1, 0), (1, 5), (2, 3)]
SIZE = 32  # of a router's input in the tiny model
TARGETS = Targets(tuple(EXPERTS), (1, 2), (0, 1, 2), "softmax")


# --- the formula ---


def test_the_fewest_directions_that_hold_the_energy() -> None:
    """M = diag(1, 6, 0, 3): the axes 1, 3, 0 hold .6, .9 and all of it; no direction is needed for axis 2."""
    moment = torch.diag(torch.tensor([1.0, 6.0, 0.0, 3.0], dtype=torch.float64))
    found = {energy: NullSpaceAnchor(energy=energy).basis(moment) for energy in (0.5, 0.6, 0.61, 0.9, 1.0)}
    assert {energy: basis.shape[1] for energy, basis in found.items()} == {
        0.5: 1,
        0.6: 1,
        0.61: 2,
        0.9: 2,
        1.0: 3,
    }
    assert found[1.0].abs().argmax(dim=0).tolist() == [1, 3, 0]


def test_a_change_loses_its_part_in_the_span() -> None:
    """W_0 = (1, 2, 3), W = (2, 4, 6), U the first axis and (0, 3, 4) / 5: of the change (1, 2, 3) the parts 1 and
    18/5 * (3, 4)/5 = (2.16, 2.88) go; W = (1, 2 + 2 - 2.16, 3 + 3 - 2.88) = (1, 1.84, 3.12).
    """
    weight = nn.Parameter(torch.tensor([[2.0, 4.0, 6.0]]))
    basis = torch.tensor([[1.0, 0.0], [0.0, 0.6], [0.0, 0.8]], dtype=torch.float64)
    Projection(weight, torch.tensor([[1.0, 2.0, 3.0]]), basis).apply()
    torch.testing.assert_close(weight.data, torch.tensor([[1.0, 1.84, 3.12]]))


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_with_all_the_energy_nothing_in_the_span_changes(size: int, tokens: int, seed: int) -> None:
    """Orthonormal, as many as the inputs have dimensions, and W x = W_0 x to the rounding of float32."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    basis = NullSpaceAnchor(energy=1).basis(inputs.T @ inputs)
    assert basis.shape == (size, min(size, tokens))
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    weight, original = (torch.randn(4, size, generator=generator) for _ in range(2))
    parameter = nn.Parameter(weight.clone())
    Projection(parameter, original, basis).apply()
    torch.testing.assert_close(parameter.double() @ inputs.T, original.double() @ inputs.T, atol=1e-5, rtol=0)
    if basis.shape[1] < size:  # one direction is free at least
        assert (parameter - original).abs().max() > 1e-4


# --- in the loop ---


def random_rows(count: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 7, (count,), generator=generator).tolist()
    return [Row(tuple(torch.randint(3, 64, (n,), generator=generator).tolist())) for n in lengths]


# At most 18 retain tokens, so 14 of 32 directions are free at least.
RETAIN = random_rows(3, seed=2)
TASK = Task(
    forget=random_rows(9, seed=1),
    retain=RETAIN,
    quizzes={"forget": [], "utility": []},
    probes={"forget": random_rows(2, seed=3), "retain": RETAIN},
    pad_id=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("qwen") / "model", "qwen2_moe")


def job(steps: int = 5, anchor: Any = None, **training: Any) -> JobConfig:
    values = {
        "steps": steps,
        "batch_size": 4,
        "learning_rate": 3e-2,
        "evaluate_every": 2,
        "weight_decay": 0.1,
    }
    anchor = anchor or {"name": "nullspace", "energy": 1.0}
    return config.validate({"output_dir": "x", "anchor": anchor, "training": values | training})


def engine_of(folder: Path, made: JobConfig, experts: Any = EXPERTS) -> LocalEngine:
    checkpoint = Checkpoint(folder)
    return LocalEngine(MoEModel(checkpoint), make_plan(checkpoint, experts), made.training)


def trained(folder: Path, made: JobConfig, experts: Any = EXPERTS) -> tuple[LocalEngine, list[Any]]:
    engine = engine_of(folder, made, experts)
    targets = TARGETS if experts else Targets((), (0, 1, 2), (0, 1, 2), "softmax")
    return engine, list(unlearning.run(engine, made, targets, TASK))


def inputs_of(engine: LocalEngine, rows: list[Row], layer: int) -> Tensor:
    """(N, D) the original's router inputs."""
    reads = Reads(router_inputs=frozenset({layer}))
    return engine.forward(collate(rows, 0), reference=True, reads=reads).router_inputs[layer].double()


def change(engine: LocalEngine, tensors: dict[str, Tensor], layer: int) -> Tensor:
    name = engine.model.family.router_tensor(layer)
    return tensors[name].double() - engine.model.checkpoint.read(name).double()


@pytest.mark.parametrize("experts", [EXPERTS, []], ids=["targets", "full"])
def test_routers_change_but_not_on_retain_tokens(folder: Path, experts: Any) -> None:
    """Weights of about 0.2 are rounded by 1e-8, times inputs of about 1 in 32 entries: under 1e-6. Forget tokens'
    logits change by what training does, with AdamW and weight decay; without the anchor retain tokens' do too.
    """
    engine, records = trained(folder, job(), experts)
    free, _ = trained(folder, job(anchor="none"), experts)
    for layer in (1, 2):
        kept, moved = (inputs_of(engine, rows, layer) for rows in (TASK.retain, TASK.forget))
        difference = change(engine, engine.tensors(), layer)
        assert (kept @ difference.T).abs().max() < 1e-6
        assert (moved @ difference.T).abs().max() > 1e-2
        assert (kept @ change(free, free.tensors(), layer).T).abs().max() > 1e-2
        tokens = sum(len(row.ids) for row in TASK.retain)
        assert records[0].metrics[f"anchor/rank/{layer}"] == tokens < SIZE


def test_retain_tokens_are_routed_as_before_where_nothing_below_trains(folder: Path) -> None:
    engine, _ = trained(folder, job())
    batch = collate(TASK.retain, 0)
    now, before = engine.forward(batch), engine.forward(batch, reference=True)
    torch.testing.assert_close(now.router_logits[1], before.router_logits[1], atol=1e-5, rtol=0)
    assert (now.logps - before.logps)[now.mask].abs().max() > 1e-2  # though the model has changed


def test_less_energy_leaves_more_freedom(folder: Path) -> None:
    _, all_of_it = trained(folder, job(steps=1))
    _, half = trained(folder, job(steps=1, anchor={"name": "nullspace", "energy": 0.5}))
    for layer in (1, 2):
        ranks = [records[0].metrics[f"anchor/rank/{layer}"] for records in (half, all_of_it)]
        assert 1 <= ranks[0] < ranks[1]


def test_another_anchor_sets_the_routers_of_a_used_engine_free(folder: Path) -> None:
    made = job(anchor="none")
    engine = engine_of(folder, made)
    start = engine.state()
    list(unlearning.run(engine, job(), TARGETS, TASK))
    engine.load_state(start)
    list(unlearning.run(engine, made, TARGETS, TASK))
    expected = trained(folder, made)[0].tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in engine.tensors().items())


def test_a_run_that_goes_on_keeps_to_the_original(folder: Path) -> None:
    """Not to the router as it was when the run was interrupted: the same bits as without interruption."""
    whole, made = trained(folder, job())[0], job()
    interrupted = engine_of(folder, made)
    for progress in unlearning.run(interrupted, made, TARGETS, TASK):
        if progress.step == 2:
            saved = progress.save()
            break
    engine = engine_of(folder, made)
    list(unlearning.run(engine, made, TARGETS, TASK, saved))
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in engine.tensors().items())


def test_moments_are_the_sum_over_real_tokens_of_chosen_rows(folder: Path) -> None:
    """Two of three rows, spread evenly (the first two), in batches of 4 and of 1; padding never counts."""
    engine = engine_of(folder, job())
    inputs = torch.cat([inputs_of(engine, [row], 2) for row in TASK.retain[:2]])
    for size in (4, 1):
        found = router_moments(engine, job(batch_size=size), (1, 2), TASK, num_rows=2)
        assert set(found) == {1, 2} and found[2].dtype == torch.float64
        torch.testing.assert_close(found[2], inputs.T @ inputs, rtol=1e-5, atol=1e-5)


def rank(folder: str) -> dict[str, Any]:
    """The same run on one rank of two that share the experts."""
    import torch.distributed as dist

    from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine, owned_experts

    made, checkpoint = job(), Checkpoint(Path(folder))
    cluster = ClusterConfig(num_workers=2, expert_parallel_size=2)
    model = MoEModel(checkpoint, owned=owned_experts(checkpoint.shape.num_experts, dist.get_rank(), 2))
    engine = DeepSpeedEngine(model, make_plan(checkpoint, EXPERTS), made.training, cluster)
    records = list(unlearning.run(engine, made, TARGETS, TASK))
    return {"tensors": engine.tensors(), "ranks": records[0].metrics["anchor/rank/1"]}


@pytest.mark.slow
def test_two_expert_parallel_processes_keep_to_the_same_space(folder: Path) -> None:
    alone, records = trained(folder, job())
    found = run(rank, 2, str(folder))
    for one in found:
        assert one["ranks"] == records[0].metrics["anchor/rank/1"]
        for layer in (1, 2):
            kept = inputs_of(alone, TASK.retain, layer)
            assert (kept @ change(alone, one["tensors"], layer).T).abs().max() < 1e-6
            assert change(alone, one["tensors"], layer).abs().max() > 1e-3
    for name, tensor in found[0]["tensors"].items():
        assert torch.equal(tensor, found[1]["tensors"][name])


# --- what cannot be ---


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_optimizers_are_refused_on_the_driver(tmp_path: Path, stage: int) -> None:
    values = {
        "output_dir": tmp_path / "run",
        "anchor": "nullspace",
        "cluster": {"zero_stage": stage, "num_workers": 2},
    }
    with pytest.raises(ConfigError, match=rf"nullspace.*zero_stage = {stage}.*set cluster.zero_stage = 0"):
        Job(config.validate(values))
