"""Figures of training steps: equal to loops by hand, the same over ranks, and without any effect on training."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tasks import each, make_plan
from test_unlearning import EXPERTS, TASK, Rank, Recording, rows_at, targets
from tiny import save_tiny
from torch import Tensor

from seuf_ray import config, unlearning
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import ClusterConfig, JobConfig, TelemetryConfig
from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Row
from seuf_ray.engine import LocalEngine
from seuf_ray.model.moe import MoEModel
from seuf_ray.telemetry import Telemetry
from seuf_ray.unlearning import Steps

DRIFT = ("overlap_top1", "overlap_topk", "kl")
Metrics = dict[str, float]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny(tmp_path_factory.mktemp("telemetry") / "model", "qwen2_moe"))


def job(*, anchor: Any = "kl", algorithm: Any = "ga", telemetry: Any = None, **more: Any) -> JobConfig:
    training = {"steps": 6, "batch_size": 4, "evaluate_every": 2, "learning_rate": 1e-2}
    told = {"anchor": anchor, "algorithm": algorithm, "telemetry": telemetry or {"anchor_gradient_every": 1}}
    return config.validate({"output_dir": "x", "training": training} | told | more)


def start(checkpoint: Checkpoint, made: JobConfig, **plan: Any) -> LocalEngine:
    tensors = make_plan(checkpoint, EXPERTS, **plan)
    return LocalEngine(MoEModel(checkpoint), tensors, made.training, made.engine)


def steps_of(checkpoint: Checkpoint, made: JobConfig) -> Steps:
    return Steps(start(checkpoint, made), made, targets(), TASK)


def of_steps(metrics: Metrics) -> Metrics:
    return {key: value for key, value in metrics.items() if key.startswith("step/")}


# --- values ---


def routed(model: MoEModel, rows: list[Row]) -> dict[int, list[list[float]]]:
    """layer -> the logits of each real token, row by row and without padding."""
    found: dict[int, list[list[float]]] = {}
    for row in rows:
        for layer, logits in model.route(collate([row], 0))[0].items():
            found.setdefault(layer, []).extend(logits.tolist())
    return found


def top(logits: list[float], k: int = 2) -> list[int]:
    return sorted(range(len(logits)), key=lambda e: -logits[e])[:k]


def divergence(before: list[float], now: list[float]) -> float:
    p, q = ([math.exp(z) / sum(map(math.exp, logits)) for z in logits] for logits in (before, now))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_hand(before: list[float], now: list[float], experts: list[int]) -> Metrics:
    """One token's contribution to each figure of a layer."""
    return {
        "overlap_top1": float(top(before, 1) == top(now, 1)),
        "overlap_topk": len({*top(before)} & {*top(now)}) / 2,
        "kl": divergence(before, now),
        "target_tokens": float(bool({*top(now)} & {*experts})),
        "target_tokens_ref": float(bool({*top(before)} & {*experts})),
    }


@torch.no_grad()
def test_figures_are_those_of_loops_over_tokens(checkpoint: Checkpoint) -> None:
    """Four steps: each step's rows one by one, without padding, through the original and through what was trained
    before that step; means are over the tokens of all four.
    """
    steps = steps_of(checkpoint, job())
    original, current = MoEModel(checkpoint), MoEModel(checkpoint)
    sums: Metrics = {}
    tokens = 0
    for step in (1, 2, 3, 4):
        current.exchange(steps.engine.tensors())
        rows = rows_at(steps, "forget", step)
        before, now = routed(original, rows), routed(current, rows)
        tokens += sum(len(row.ids) for row in rows)
        for layer, experts in ((1, [0, 5]), (2, [3])):
            for a, b in zip(before[layer], now[layer], strict=True):
                for name, value in by_hand(a, b, experts).items():
                    sums[f"step/{name}/{layer}"] = sums.get(f"step/{name}/{layer}", 0.0) + value
        with torch.enable_grad():
            steps.take(step)
    found = steps.telemetry.collect()
    norm = found.pop("step/anchor_grad_norm")
    assert found == pytest.approx({name: value / tokens for name, value in sums.items()}, abs=1e-5)
    assert norm > 0 and found["step/overlap_topk/2"] < 1 and found["step/kl/1"] > 1e-4
    assert found["step/target_tokens/1"] != found["step/target_tokens_ref/1"]  # else swapping them would pass


@pytest.mark.parametrize("kind", ["kl", "onehot"])
@pytest.mark.parametrize("micro", [None, 2])
def test_the_anchors_gradient_is_that_of_plain_autograd(
    checkpoint: Checkpoint, kind: str, micro: int | None
) -> None:
    """At the third step, in a model of its own whose router weights are leaves: the anchor's formula, nothing else.
    The recorded norm is the mean over steps, so the first two are collected before it.
    """
    made = job(anchor={"name": kind, "weight": 3.0}, engine={"micro_batch_size": micro})
    steps = steps_of(checkpoint, made)
    steps.take(1), steps.take(2)
    steps.telemetry.collect()
    original, current = MoEModel(checkpoint), MoEModel(checkpoint)
    current.exchange(steps.engine.tensors())
    weights = [current.sites[layer].gate.weight.requires_grad_() for layer in (1, 2)]
    batch = collate(rows_at(steps, "forget", 3), 0)
    before, (logits, choices) = original.route(batch)[0], current.route(batch)
    distances = []
    for layer, experts in ((1, [0, 5]), (2, [3])):
        p, q = before[layer].softmax(-1), logits[layer].softmax(-1)
        gate, wanted = torch.zeros_like(q), torch.zeros_like(q)
        for token, chosen in enumerate(choices[layer].tolist()):
            gate[token, chosen] = q[token, chosen]
        wanted[:, experts] = 1.0
        one = (p * (p / q).log()).sum(1) if kind == "kl" else (gate - wanted).square().sum(1)
        distances.append(one.mean())
    gradients = torch.autograd.grad(3.0 * sum(distances) / 2, weights)
    expected = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    steps.take(3)
    assert steps.telemetry.collect()["step/anchor_grad_norm"] == pytest.approx(expected, rel=1e-3)


def test_a_record_is_about_the_steps_since_the_last_one(checkpoint: Checkpoint) -> None:
    """Records after two steps each are those of a telemetry that was asked every step, weighted by tokens."""
    made = job()
    records = list(unlearning.run(start(checkpoint, made), made, targets(), TASK))
    assert of_steps(records[0].metrics) == {}
    single = steps_of(checkpoint, made)
    for first, record in zip((1, 3, 5), records[1:], strict=True):
        sums: Metrics = {}
        tokens = 0
        for step in (first, first + 1):
            single.take(step)
            count = sum(len(row.ids) for row in rows_at(single, "forget", step))
            tokens += count
            for name, value in single.telemetry.collect().items():
                sums[name] = sums.get(name, 0.0) + value * (1 if "norm" in name else count)
        expected = {name: value / (2 if "norm" in name else tokens) for name, value in sums.items()}
        assert of_steps(record.metrics) == pytest.approx(expected, rel=1e-6)


# --- what is there ---


@pytest.mark.parametrize(
    ("anchor", "telemetry", "names", "has_norm"),
    [
        ("kl", {"anchor_gradient_every": 1}, {*DRIFT, "target_tokens", "target_tokens_ref"}, True),
        ("onehot", {"anchor_gradient_every": 1}, {"target_tokens"}, True),
        ("none", {"anchor_gradient_every": 1}, {"target_tokens"}, False),
        ("none", {"reference": True}, {*DRIFT, "target_tokens", "target_tokens_ref"}, False),
        ("kl", {"every": 0, "anchor_gradient_every": 2}, set(), True),
        ("kl", {"every": 0, "anchor_gradient_every": 0, "reference": True}, set(), False),
        ("kl", {"every": 3, "anchor_gradient_every": 3}, set(), False),  # two steps are taken
    ],
)
def test_only_what_the_passes_leave_behind_is_recorded(
    checkpoint: Checkpoint, anchor: str, telemetry: Any, names: set[str], has_norm: bool
) -> None:
    steps = steps_of(checkpoint, job(anchor=anchor, telemetry=telemetry))
    steps.take(1), steps.take(2)
    expected = {f"step/{name}/{layer}" for name in names for layer in (1, 2)}
    assert set(steps.telemetry.collect()) == expected | ({"step/anchor_grad_norm"} if has_norm else set())
    assert steps.telemetry.collect() == {}


def test_no_pass_runs_for_telemetry_unless_it_is_asked_for(checkpoint: Checkpoint) -> None:
    for reference, references in ((False, 0), (True, 1)):
        made = job(anchor="none", telemetry={"reference": reference})
        engine = Recording(MoEModel(checkpoint), make_plan(checkpoint, [(1, 0)]), made.training)
        Steps(engine, made, targets(), TASK).take(1)
        assert [one.reference for one in engine.passes] == [True] * references + [False]
        assert all(one.depth == 3 for one in engine.passes if one.reference)  # every layer, no head


def test_a_plan_without_routers_has_no_gradient_to_look_at(checkpoint: Checkpoint) -> None:
    made = job(anchor="onehot")
    steps = Steps(start(checkpoint, made, routers=False), made, targets(), TASK)
    steps.take(1)
    assert set(steps.telemetry.collect()) == {"step/target_tokens/1", "step/target_tokens/2"}


def test_the_full_baseline_has_figures_too(checkpoint: Checkpoint) -> None:
    """No target experts, so nothing is said of their tokens; every router trains."""
    made = job()
    engine = LocalEngine(MoEModel(checkpoint), make_plan(checkpoint, []), made.training, made.engine)
    whole = unlearning.Targets((), (0, 1, 2), (0, 1, 2), "softmax")
    steps = Steps(engine, made, whole, TASK)
    for step in (1, 2, 3):
        steps.take(step)
    found = steps.telemetry.collect()
    assert set(found) == {f"step/{name}/{at}" for name in DRIFT for at in (0, 1, 2)} | {
        "step/anchor_grad_norm"
    }
    assert found["step/kl/0"] > 0 and found["step/anchor_grad_norm"] > 0


def test_every_key_is_documented(checkpoint: Checkpoint) -> None:
    steps = steps_of(checkpoint, job())
    steps.take(1)
    found = {key if "norm" in key else f"{key.rpartition('/')[0]}/LAYER" for key in steps.telemetry.collect()}
    documented = {line.split()[0] for line in str(_module().__doc__).splitlines() if "    step/" in line}
    assert found == documented


def _module() -> Any:
    import seuf_ray.telemetry

    return seuf_ray.telemetry


def test_a_step_that_is_given_up_leaves_no_trace(checkpoint: Checkpoint) -> None:
    """Observed twice, ended once."""
    made = job(anchor="none")
    engine = start(checkpoint, made)
    telemetry = Telemetry(engine, targets(), TelemetryConfig())
    whole, other = (engine.forward(collate(TASK.forget[part], 0)) for part in (slice(5), slice(5, 10)))
    for step, forget, is_taken in ((1, whole, True), (2, other, False)):
        telemetry.begin(step)
        telemetry.observe({"forget": forget}, {})
        if is_taken:
            telemetry.end()
    telemetry.begin(3)
    hits = sum(3 in chosen for chosen in whole.router_choices[2].tolist())
    assert telemetry.collect()["step/target_tokens/2"] == pytest.approx(hits / len(whole.router_choices[2]))


# --- no effect on training ---


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"micro_batch_size": 3}])
@pytest.mark.parametrize("anchor", ["kl", "onehot", "none"])
def test_training_is_the_same_bits_with_and_without(
    checkpoint: Checkpoint, anchor: str, options: dict[str, Any]
) -> None:
    off = {"every": 0, "anchor_gradient_every": 0}
    on = {"every": 1, "anchor_gradient_every": 1, "reference": True}
    found = []
    for telemetry in (off, on):
        made = job(algorithm="gdiff", anchor=anchor, telemetry=telemetry, engine=options)
        engine = start(checkpoint, made)
        records = list(unlearning.run(engine, made, targets(), TASK))
        rest = [
            {k: v for k, v in p.metrics.items() if k != "seconds" and not k.startswith("step/")}
            for p in records
        ]
        found.append((engine.tensors(), rest, of_steps(records[-1].metrics)))
    (tensors, metrics, none), (same, equal, some) = found
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())
    assert metrics == equal and not none and some


@pytest.mark.parametrize("stop_after", [2, 4])
def test_a_run_that_goes_on_has_the_same_figures(checkpoint: Checkpoint, stop_after: int) -> None:
    made = job(telemetry={"every": 1, "anchor_gradient_every": 3})
    records = list(unlearning.run(start(checkpoint, made), made, targets(), TASK))
    saved = records[stop_after // 2].save
    for progress in unlearning.run(start(checkpoint, made), made, targets(), TASK):
        if progress.step == stop_after:
            saved = progress.save
            break
    file = io.BytesIO()
    assert saved is not None
    torch.save(saved(), file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    rest = list(unlearning.run(start(checkpoint, made), made, targets(), TASK, again))
    expected = [of_steps(p.metrics) for p in records if p.step > stop_after]
    assert [of_steps(p.metrics) for p in rest] == expected


# --- several ranks ---


@pytest.mark.parametrize("batch_size", [1, 5])
def test_two_ranks_have_the_figures_of_one(checkpoint: Checkpoint, batch_size: int) -> None:
    """A batch of 1 leaves one rank with fillers; 5 rows are 3 and 2, so a mean of means would be another."""
    made = job(training={"steps": 4, "batch_size": batch_size, "evaluate_every": 2, "learning_rate": 1e-2})
    alone = [p.metrics for p in unlearning.run(start(checkpoint, made), made, targets(), TASK)]
    barrier, table = threading.Barrier(2), [None] * 2

    def work(rank: int) -> list[Metrics]:
        model, plan = MoEModel(checkpoint), make_plan(checkpoint, EXPERTS)
        engine: Any = Rank(rank, table, barrier, model, plan, made.training)
        return [p.metrics for p in unlearning.run(engine, made, targets(), TASK)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    for one, a, b in zip(alone, first, second, strict=True):
        assert of_steps(a) == of_steps(b) == pytest.approx(of_steps(one), rel=2e-3, abs=1e-5)


def deepspeed_rank(folder: str, cluster: dict[str, Any], telemetry: dict[str, Any]) -> tuple[Any, Metrics]:
    """A whole run on one of several processes: tensors, and the figures of its last record."""
    from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine, owned_experts

    class Partitioned(DeepSpeedEngine):
        """ZeRO 3 leaves small parameters whole; here it must not."""

        def _deepspeed_config(self) -> dict[str, Any]:
            settings = super()._deepspeed_config()
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            return settings

    torch.set_num_threads(1)
    made, checkpoint = job(telemetry=telemetry), Checkpoint(Path(folder))
    owned = owned_experts(checkpoint.shape.num_experts, dist.get_rank(), cluster["expert_parallel_size"])
    model, plan = MoEModel(checkpoint, owned=owned), make_plan(checkpoint, EXPERTS)
    engine = Partitioned(model, plan, made.training, ClusterConfig(**cluster))
    *_, last = unlearning.run(engine, made, targets(), TASK)
    return engine.tensors(), of_steps(last.metrics)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "zero"), [(2, 0), (1, 2), (2, 3)])
def test_deepspeed_has_the_figures_of_one_process(
    checkpoint: Checkpoint, two_processes: Callable[..., Any], parallel: int, zero: int
) -> None:
    """The same figures as LocalEngine's, and the same bits with telemetry as without."""
    cluster = {"num_workers": 2, "expert_parallel_size": parallel, "zero_stage": zero}
    on, off = {"anchor_gradient_every": 2}, {"every": 0, "anchor_gradient_every": 0}
    folder = str(checkpoint.folder)
    jobs = [(folder, cluster, telemetry) for telemetry in (on, off)]
    ((tensors, found), (without, none)), ((_, again), _) = two_processes(each, deepspeed_rank, jobs)
    made = job(telemetry=on)
    *_, alone = unlearning.run(start(checkpoint, made), made, targets(), TASK)
    assert found == again == pytest.approx(of_steps(alone.metrics), rel=2e-3, abs=1e-5)
    assert none == {} and same_bits(tensors, without)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
