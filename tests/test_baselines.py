"""Baselines are plans: each trains through the same engine, and leaves a patch that plain transformers understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run
from tasks import LEARNING_RATE, ascend, random_batch, rows_of
from tiny import PROVENANCE, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from seuf_ray.artifacts import AttributionReport, DataSummary, LayerScores, UnlearningPlan
from seuf_ray.attribution.selection import choose_targets
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import ClusterConfig, JobConfig, TargetsConfig, TrainingConfig
from seuf_ray.engine import LocalEngine
from seuf_ray.errors import ConfigError
from seuf_ray.feasibility import _check_parallelism, _check_targets
from seuf_ray.model.moe import MoEModel
from seuf_ray.patch import rewrite

SCOPES = ("full", "experts", "routers", "shared", "esft", "lora")
TWO = {"num_workers": 2, "expert_parallel_size": 2}
FAMILIES = ("qwen2_moe", "deepseek_v3", "deepseek_v2", "mixtral")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param) / "model", request.param)


def report_of(checkpoint: Checkpoint) -> AttributionReport:
    """Expert e of a layer has e + 1 of 36 parts of every score."""
    row = [(e + 1) / 36 for e in range(8)]
    layers = [
        LayerScores(layer=layer, affinity=row, router_score=row, token_share=row)
        for layer in checkpoint.shape.moe_layers
    ]
    return AttributionReport(
        model=checkpoint.identity("tiny"),
        provenance=PROVENANCE,
        score="affinity",
        num_experts=8,
        top_k=2,
        data=DataSummary(sources=["x"], num_texts=1, num_rows=1, num_tokens=1),
        digest="0" * 64,
        layers=layers,
        warnings=[],
    )


def plan_of(checkpoint: Checkpoint, scope: Any, **targets: Any) -> UnlearningPlan:
    config = TargetsConfig(scope=scope, **targets)
    return choose_targets(report_of(checkpoint), config, checkpoint, PROVENANCE)


def engine_of(checkpoint: Checkpoint, plan: UnlearningPlan) -> LocalEngine:
    return LocalEngine(MoEModel(checkpoint), plan, TrainingConfig(weight_decay=0.5))


def plain_logps(folder: Path) -> Tensor:
    batch = random_batch()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.attention.long()).logits
    found = logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None]).squeeze(2)
    return found[batch.counted[:, 1:]]


def has_shared(folder: Path) -> bool:
    return folder.parent.name.startswith(("qwen2_moe", "deepseek"))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_baseline_trains_its_tensors_and_merges_into_a_plain_checkpoint(
    folder: Path, scope: str, tmp_path: Path
) -> None:
    """Three steps of ascent with weight decay .5. The patch holds the plan's tensors, all of them changed; the merged
    checkpoint in plain transformers is the trained model; and the original is still there, bit for bit.
    """
    checkpoint, batch = Checkpoint(folder), random_batch()
    if scope == "shared" and not has_shared(folder):
        with pytest.raises(ConfigError, match="'shared': a mixtral model has no such tensors"):
            plan_of(checkpoint, scope)
        return
    plan = plan_of(checkpoint, scope)
    engine = engine_of(checkpoint, plan)
    original = MoEModel(checkpoint).forward(batch)
    buffers = sum(b.numel() for n, b in engine.model.module.named_buffers() if n.endswith("correction_bias"))
    numel = sum(parameter.numel() for parameter in engine.parameters())
    assert numel == plan.num_trainable - (buffers if scope == "full" else 0)
    assert plan.trainable_fraction == plan.num_trainable / checkpoint.num_parameters
    for step in range(3):
        ascend(engine, random_batch(seed=step))
    trained, reference = engine.forward(batch), engine.forward(batch, reference=True)
    assert torch.equal(reference.logps[reference.mask], original.logps[original.mask])
    tensors = engine.tensors()
    assert sorted(tensors) == (plan.tensors or sorted(engine.model.tensor_names()))
    changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, checkpoint.read(name))]
    assert len(changed) > 0.8 * len(tensors)  # an expert that no token chose has no gradient
    rewrite(checkpoint, tensors, tmp_path / "merged")
    expected = plain_logps(tmp_path / "merged")
    torch.testing.assert_close(trained.logps[trained.mask], expected, atol=3e-5, rtol=1e-4)
    assert (trained.logps - original.logps)[trained.mask].abs().max() > 0.01


@pytest.mark.parametrize("scope", ["shared", "lora", "esft"])
def test_a_state_is_all_that_training_changed(scope: str, tmp_path: Path) -> None:
    """One step, a saved state, another step, back, and the same step again: the same bits."""
    checkpoint = Checkpoint(save_tiny(tmp_path / "model", "qwen2_moe"))
    engine = engine_of(checkpoint, plan_of(checkpoint, scope))
    ascend(engine, random_batch(seed=0))
    state = engine.state()
    ascend(engine, random_batch(seed=1))
    once = engine.tensors()
    engine.load_state(state)
    ascend(engine, random_batch(seed=1))
    again = engine.tensors()
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())


class TestPlans:
    """qwen2_moe: 3 layers, D = 32, 8 experts of F = 16, shared expert of 24, attention of 4 heads of 8 with biases."""

    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
        return Checkpoint(save_tiny(tmp_path_factory.mktemp("plans") / "model", "qwen2_moe"))

    @pytest.mark.parametrize(
        ("scope", "numel"),
        [
            ("experts", 3 * 8 * 3 * 16 * 32),
            ("routers", 3 * 8 * 32),
            ("shared", 3 * (3 * 24 * 32 + 32)),  # and the gate of the shared expert
            ("esft", 3 * 2 * 3 * 16 * 32),  # 8/36 and 7/36 reach .4
            # attention: 4 x r (32 + 32); an expert: gate and up as one r (32 + 32), down r (16 + 32)
            ("lora", 3 * 2 * (4 * 64 + 8 * (64 + 48))),
        ],
    )
    def test_sizes(self, checkpoint: Checkpoint, scope: str, numel: int) -> None:
        plan = plan_of(checkpoint, scope, share=0.4, lora_rank=2)
        assert plan.num_trainable == numel and plan.first_layer == 0

    def test_esft_takes_no_router(self, checkpoint: Checkpoint) -> None:
        plan = plan_of(checkpoint, "esft", share=0.4)
        assert plan.experts == [(layer, e) for layer in range(3) for e in (6, 7)] and plan.routers == []

    def test_routers_only_can_be_frozen_by_nobody(self, checkpoint: Checkpoint) -> None:
        config = TargetsConfig(scope="routers")
        with pytest.raises(ConfigError, match="'routers' trains every router"):
            choose_targets(report_of(checkpoint), config, checkpoint, PROVENANCE, train_routers=False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"targets": {"scope": "lora"}, "cluster": {"num_workers": 2, "expert_parallel_size": 2}},
            "expert_parallel_size = 1",
        ),
        (
            {"targets": {"scope": "experts"}, "cluster": {"num_workers": 2, "expert_parallel_size": 2}},
            "expert_parallel_size = 1",
        ),
        ({"targets": {"scope": "experts"}, "anchor": "onehot"}, "not allowed here are onehot, nullspace"),
        ({"targets": {"scope": "routers"}, "anchor": "frozen"}, "not allowed here are frozen, onehot"),
        ({"targets": {"scope": "esft"}, "anchor": "nullspace"}, "not allowed here are nullspace"),
    ],
)
def test_what_a_baseline_cannot_do_is_refused(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path / "model", "qwen2_moe"))
    config = JobConfig.model_validate({"output_dir": "x", **values})
    with pytest.raises(ConfigError, match=words):
        _check_parallelism(config, checkpoint)
        _check_targets(config, checkpoint)


def test_lora_without_peft_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    checkpoint = Checkpoint(save_tiny(tmp_path / "model", "qwen2_moe"))
    with pytest.raises(ConfigError, match=r"pip install 'seuf-ray\[lora\]'"):
        engine_of(checkpoint, plan_of(checkpoint, "lora"))


def train_baseline(folder: str, scope: str) -> dict[str, Tensor]:
    """Two steps on one of two ranks that share the experts."""
    import torch.distributed as dist

    from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine, owned_experts

    checkpoint, rank = Checkpoint(Path(folder)), dist.get_rank()
    model = MoEModel(checkpoint, owned=owned_experts(8, rank, 2))
    cluster = ClusterConfig(num_workers=2, expert_parallel_size=2)
    engine = DeepSpeedEngine(model, plan_of(checkpoint, scope), TrainingConfig(), cluster)
    for step in range(2):
        ascend(engine, rows_of(random_batch(seed=step), list(range(rank, 5, 2))))
    return engine.tensors()


@pytest.mark.parametrize("scope", ["esft", "routers"])
def test_baselines_of_experts_and_routers_run_expert_parallel(scope: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path / "model", "qwen2_moe"))
    one = LocalEngine(MoEModel(checkpoint), plan_of(checkpoint, scope), TrainingConfig())
    for step in range(2):
        ascend(one, random_batch(seed=step))
    expected = one.tensors()
    for found in run(train_baseline, 2, str(tmp_path / "model"), scope):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=LEARNING_RATE * 3e-2, rtol=0)
