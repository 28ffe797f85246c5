"""Guards, the best step, and going on from a saved state: the loop's promises when things go wrong."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import make_plan
from test_unlearning import EXPERTS, TASK, targets
from tiny import save_tiny

from seuf_ray import config, unlearning
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import GuardsConfig, JobConfig
from seuf_ray.data.batches import collate
from seuf_ray.engine import LocalEngine
from seuf_ray.guards import Keeper
from seuf_ray.model.moe import MoEModel
from seuf_ray.unlearning import Progress

TASK_BATCH = collate(TASK.forget, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny(tmp_path_factory.mktemp("guards") / "model", "qwen2_moe"))


def job(**more: Any) -> JobConfig:
    training = {"steps": 6, "batch_size": 4, "evaluate_every": 2, "learning_rate": 1e-2}
    return config.validate({"output_dir": "x", "training": training} | more)


def start(checkpoint: Checkpoint, made: JobConfig) -> LocalEngine:
    return LocalEngine(MoEModel(checkpoint), make_plan(checkpoint, EXPERTS), made.training, made.engine)


def go(engine: LocalEngine, made: JobConfig, saved: Any = None) -> Iterator[Progress]:
    return unlearning.run(engine, made, targets(), TASK, saved)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stop_after", [0, 2, 4])
def test_a_run_that_goes_on_from_a_saved_state_ends_with_the_same_bits(
    checkpoint: Checkpoint, stop_after: int
) -> None:
    made = job(guards={"keep": "best", "metric": "forget_accuracy"})
    whole = start(checkpoint, made)
    records = list(go(whole, made))
    first = start(checkpoint, made)
    for progress in go(first, made):
        if progress.step == stop_after:
            assert progress.save is not None
            file = io.BytesIO()
            torch.save(progress.save(), file)
            break
    file.seek(0)
    second = start(checkpoint, made)  # another process, as far as it can tell
    rest = list(go(second, made, torch.load(file, weights_only=True)))
    assert [p.step for p in rest] == [p.step for p in records if p.step > stop_after]
    assert same(second.tensors(), whole.tensors())
    assert rest[-1].kept == records[-1].kept
    without_time = [{k: v for k, v in p.metrics.items() if k != "seconds"} for p in (rest[-1], records[-1])]
    assert without_time[0] == without_time[1]


def test_a_violated_guard_rolls_back_to_the_original_if_nothing_better_is_known(
    checkpoint: Checkpoint,
) -> None:
    """A KL above 1e-7, which rounding does not reach, comes with the first evaluation; the best step before it is 0."""
    made = job(anchor="none", guards={"max_kl": 1e-7})
    engine = start(checkpoint, made)
    original = engine.tensors()
    records = list(go(engine, made))
    assert [p.step for p in records] == [0, 2]
    assert (
        records[-1].stopped is not None and "guards.max_kl = 1e-07 violated at step 2" in records[-1].stopped
    )
    assert records[-1].kept == 0 and same(engine.tensors(), original)


def test_stop_keeps_the_tensors_as_they_are(checkpoint: Checkpoint) -> None:
    made = job(anchor="none", guards={"max_kl": 1e-7, "action": "stop"})
    engine = start(checkpoint, made)
    original = engine.tensors()
    records = list(go(engine, made))
    assert records[-1].kept == 2 and not same(engine.tensors(), original)


class Scripted:
    """An engine whose state is a number."""

    def __init__(self) -> None:
        self.value = 0

    def state(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def play(evaluations: list[tuple[float, float]], **guards: Any) -> tuple[Scripted, int, str | None]:
    """(forget accuracy, utility) at steps 0, 1, ...; what is kept, and why it ended."""
    engine = Scripted()
    keeper = Keeper(engine, GuardsConfig(**guards))  # type: ignore[arg-type]
    violated = None
    for step, (forget, utility) in enumerate(evaluations):
        engine.value = step
        violated = keeper.judge(step, {"forget_accuracy": forget, "utility": utility})
        if violated:
            break
    kept = keeper.finish(step, violated)
    return engine, kept, violated


def test_the_best_step_is_by_the_chosen_metric() -> None:
    """Gaps are -.1, .4, .5, .1; utility is highest at 0, forget accuracy lowest at 3."""
    story = [(0.9, 0.8), (0.4, 0.8), (0.2, 0.7), (0.1, 0.2)]
    assert play(story)[1] == 3  # keep = last
    assert play(story, keep="best")[0].value == 2
    assert play(story, keep="best", metric="utility")[1] == 0
    assert play(story, keep="best", metric="forget_accuracy")[1] == 3


def test_a_utility_floor_rolls_back_to_the_best_step_above_it() -> None:
    engine, kept, violated = play([(0.9, 0.9), (0.5, 0.85), (0.2, 0.6)], min_utility=0.8)
    assert violated is not None and "min_utility" in violated and "0.6" in violated
    assert kept == engine.value == 1


def test_limits_are_about_forget_tokens_over_all_layers() -> None:
    keeper = Keeper(Scripted(), GuardsConfig(max_drift=0.3))  # type: ignore[arg-type]
    metrics = {"forget_accuracy": 0.5, "utility": 0.9, "overlap_topk/retain/1": 0.0}
    fine = {"overlap_topk/forget/0": 1.0, "overlap_topk/forget/1": 0.41}  # drift (0 + .59) / 2 = .295
    assert keeper.judge(1, metrics | fine) is None
    assert "max_drift" in str(keeper.judge(2, metrics | fine | {"overlap_topk/forget/1": 0.39}))


def test_caches_change_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """In memory, spilled to files, or off: bit-identical tensors and metrics, several epochs long."""
    results = []
    for max_bytes, spill in ((2**30, None), (0, None), (2000, tmp_path / "spill")):
        training = {"steps": 9, "batch_size": 4, "evaluate_every": 3, "learning_rate": 1e-2}
        made = job(training=training, algorithm="gdiff", engine={"prefix_cache_bytes": max_bytes})
        engine = LocalEngine(
            MoEModel(checkpoint), make_plan(checkpoint, [(2, 1)]), made.training, made.engine, spill
        )
        records = list(go(engine, made))
        results.append((engine, [{k: v for k, v in p.metrics.items() if k != "seconds"} for p in records]))
    (cached, a), (plain, b), (spilled, c) = results
    assert a == b == c
    assert same(cached.tensors(), plain.tensors()) and same(cached.tensors(), spilled.tensors())
    assert cached.cache.hits > 20 and plain.cache.hits == 0 and spilled.cache.hits == cached.cache.hits
    assert list((tmp_path / "spill").glob("*.safetensors"))


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulated_micro_batches_train_what_whole_batches_do(checkpoint: Checkpoint, micro: int) -> None:
    """Counts are those of the whole batch, so sums over its parts are the same up to rounding."""
    whole, parts = job(algorithm="gdiff"), job(algorithm="gdiff", engine={"micro_batch_size": micro})
    a, b = start(checkpoint, whole), start(checkpoint, parts)
    last_a, last_b = list(go(a, whole))[-1], list(go(b, parts))[-1]
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(b.tensors()[name], tensor, atol=2e-4, rtol=0)
    assert last_b.metrics["loss/total"] == pytest.approx(last_a.metrics["loss/total"], abs=1e-3)


def test_recomputing_activations_changes_no_gradient_and_keeps_the_anchors(checkpoint: Checkpoint) -> None:
    """The authors' anchor had no gradient under (reentrant) checkpointing: the router's must follow the weight."""
    gradients = {}
    for recompute in (False, True):
        for weight in (0.0, 5.0):
            made = job(
                anchor={"name": "onehot", "weight": weight}, engine={"gradient_checkpointing": recompute}
            )
            engine = start(checkpoint, made)
            steps = unlearning.Steps(engine, made, targets(), TASK)
            engine.step = lambda rate: 0.0  # type: ignore[method-assign]  # leave the gradients where they are
            steps.take(1)
            gradients[recompute, weight] = engine.trainable.routers["1"].weight.grad.clone()
            reference = engine.forward(TASK_BATCH, reference=True)
            assert torch.equal(reference.logps, MoEModel(checkpoint).forward(TASK_BATCH).logps)
    assert torch.equal(gradients[False, 0.0], gradients[True, 0.0])
    assert torch.equal(gradients[False, 5.0], gradients[True, 5.0])
    assert not torch.allclose(gradients[True, 0.0], gradients[True, 5.0], atol=1e-3)
