"""Every algorithm through the loop on a tiny Qwen2-MoE: its passes, its micro-batches, and algorithms from outside."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from forwards import sum_of
from tasks import ascend, make_plan
from tiny import save_tiny

from seuf_ray import config, plugins, unlearning
from seuf_ray.algorithms.dpo import DirectPreference
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import EngineConfig, TrainingConfig
from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Row
from seuf_ray.engine import LocalEngine
from seuf_ray.errors import ConfigError
from seuf_ray.job import Job
from seuf_ray.model.moe import MoEModel
from seuf_ray.monitor import Task
from seuf_ray.passes import Batch, Forward, Targets
from seuf_ray.stages.unlearn import make_task
from seuf_ray.unlearning import Steps


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny(tmp_path_factory.mktemp("qwen") / "model", "qwen2_moe"))


def random_rows(count: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (count,), generator=generator).tolist()
    return [Row(tuple(torch.randint(3, 64, (n,), generator=generator).tolist())) for n in lengths]


FACTS = random_rows(6, seed=1)
TASK = Task(
    forget=FACTS,
    retain=random_rows(7, seed=2),
    quizzes={},
    probes={},
    pad_id=0,
    idk=[Row((*row.ids[: len(row.ids) // 2], 60, 61, 62)) for row in FACTS],
)
EXPERTS = [(1, 0), (2, 3)]
IN_THE_TINY_MODEL = Targets(tuple(EXPERTS), (1, 2), (0, 1, 2), "softmax")


class Recording(LocalEngine):
    """Remembers the rows of each pass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.passes: list[tuple[Batch, bool]] = []

    def forward(self, batch: Batch, **kind: Any) -> Forward:
        self.passes.append((batch, kind.get("reference", False)))
        return super().forward(batch, **kind)


def steps_of(checkpoint: Checkpoint, algorithm: Any, micro_batch_size: int | None = None) -> Steps:
    training = {"batch_size": 4, "learning_rate": 1e-2}
    values = {"output_dir": "x", "algorithm": algorithm, "anchor": "none", "training": training}
    job = config.validate(values | {"engine": {"micro_batch_size": micro_batch_size}})
    plan = make_plan(checkpoint, EXPERTS)
    engine = Recording(MoEModel(checkpoint), plan, job.training, EngineConfig())
    return Steps(engine, job, IN_THE_TINY_MODEL, TASK)


@pytest.mark.parametrize("algorithm", plugins.available("algorithms"))
def test_micro_batches_train_what_the_whole_batch_does(checkpoint: Checkpoint, algorithm: str) -> None:
    """Batches of 3 rows at once and one by one, beside 4 or 3 retain rows: where sets differ, fillers step in."""
    found = []
    for size in (None, 1):
        steps = steps_of(checkpoint, algorithm, size)
        terms, norm = [], []
        for step in (1, 2):
            values, length = steps.take(step)
            terms.append(values)
            norm.append(length)
        found.append((terms, norm, steps.engine.tensors()))
    (terms, norm, tensors), (parts, norms, others) = found
    assert norms == pytest.approx(norm, rel=1e-3)
    for ours, expected in zip(parts, terms, strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-5)
    moved = [not torch.equal(tensor, checkpoint.read(name)) for name, tensor in tensors.items()]
    assert all(moved)
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("algorithm", "number"),
    [
        ({"name": "gdiff", "retain_weight": 0}, 1),
        ({"name": "gdiff", "retain": "kl"}, 3),
        ({"name": "npo", "retain_weight": 0}, 2),
        ("npo", 3),
        ("wga", 2),
        ("undial", 2),
        ({"name": "rmu", "retain_weight": 0}, 1),
        ("rmu", 3),
        ("dpo", 5),
        ({"name": "dpo", "retain": "kl"}, 6),
    ],
)
def test_a_pass_that_nothing_needs_does_not_run(checkpoint: Checkpoint, algorithm: Any, number: int) -> None:
    steps = steps_of(checkpoint, algorithm)
    steps.take(1)
    assert len(steps.engine.passes) == number


def test_winners_and_losers_are_the_same_rows_in_the_same_order(checkpoint: Checkpoint) -> None:
    """Two epochs of two batches of three: forget and idk rows begin alike, pair by pair."""
    steps, partner = steps_of(checkpoint, "dpo", micro_batch_size=2), dict(zip(FACTS, TASK.idk, strict=True))
    seen = []
    for step in range(1, 5):
        parts = steps._parts(step)
        for forget, idk in zip(parts["forget"], parts["idk"], strict=True):
            assert forget.is_filler == idk.is_filler
            losers, winners = token_rows(forget), token_rows(idk)
            assert [partner[row] for row in losers] == winners
            seen += [] if forget.is_filler else losers
    assert sorted(row.ids for row in seen) == sorted(row.ids for row in FACTS * 2)


def token_rows(batch: Batch) -> list[Row]:
    lengths = batch.attention.sum(dim=1).tolist()
    return [Row(tuple(ids[:n])) for ids, n in zip(batch.ids.tolist(), lengths, strict=True)]


def test_what_winners_and_losers_share_cancels(checkpoint: Checkpoint) -> None:
    """Counting all tokens or the answers only is the same DPO: a causal model sees the same prefix in both."""
    engine = LocalEngine(MoEModel(checkpoint), make_plan(checkpoint, EXPERTS), TrainingConfig())
    for _ in range(2):
        ascend(engine, collate(FACTS, 0))
    losses = []
    for only_answers in (False, True):
        known = {}
        for name, rows in (("forget", FACTS), ("idk", TASK.idk)):
            if only_answers:
                rows = [Row(row.ids, len(fact.ids) // 2) for row, fact in zip(rows, FACTS, strict=True)]
            known |= {name: engine.forward(collate(rows, 0)), f"{name}_ref": reference(engine, rows)}
        losses.append(sum_of(unlearning._call(DirectPreference(retain_weight=0), known)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    at_the_original = 2 / 0.1 * math.log(2)
    assert abs(losses[0].item() - at_the_original) > 0.1


def reference(engine: LocalEngine, rows: list[Row]) -> Forward:
    return engine.forward(collate(rows, 0), reference=True)


def test_a_task_has_idk_rows_for_an_algorithm_that_asks_for_them(tmp_path: Path) -> None:
    for algorithm in ("npo", "dpo"):
        job = Job(config.validate({"output_dir": tmp_path / "run", "algorithm": algorithm}))
        task = make_task(job)
        assert len(task.idk) == (len(task.forget) if algorithm == "dpo" else 0)
    shown = [job.tokenizer.decode(rows[7].ids) for rows in (task.forget, task.idk)]
    assert shown[1].startswith(shown[0][: len(shown[0]) // 3])
    assert shown[1].removesuffix(job.tokenizer.eos_token).endswith(" I don't know.")


# --- of somebody else ---

MINE = """
from seuf_ray.retain import Retaining


class Hinge(Retaining):
    margin: float = 1.0

    def loss(self, seed, forget, PASS, retain, retain_ref):
        lift = forget.sequence_logps() - PASS.sequence_logps() + self.margin + seed
        return {"hinge": forget.mean_sequences(lift.clamp(min=0)), **self.retain_term(retain, retain_ref)}
"""


@pytest.fixture
def my_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_lab").mkdir()
    return tmp_path / "my_lab"


def test_an_algorithm_outside_the_package_works_the_same(checkpoint: Checkpoint, my_lab: Path) -> None:
    """At the original the lift is 0, so the first hinge is the margin (the seed is 0); later ones are lower."""
    (my_lab / "my_algorithm.py").write_text(MINE.replace("PASS", "forget_ref"))
    steps = steps_of(checkpoint, {"name": "my_lab.my_algorithm", "margin": 2.5, "retain_weight": 0})
    first, _ = steps.take(1)
    assert len(steps.engine.passes) == 2
    assert first == pytest.approx({"loss/hinge": 2.5, "loss/total": 2.5}, abs=1e-5)
    steps.take(2)
    third, _ = steps.take(3)
    assert third["loss/hinge"] < 2.4


def test_a_pass_that_there_is_not_is_refused_with_the_allowed_ones(
    checkpoint: Checkpoint, my_lab: Path
) -> None:
    (my_lab / "misnamed.py").write_text(MINE.replace("PASS", "forget_reference"))
    with pytest.raises(
        ConfigError, match=r"'my_lab.misnamed' takes 'forget_reference': did you mean 'forget_ref'.*idk_ref"
    ):
        steps_of(checkpoint, "my_lab.misnamed")
