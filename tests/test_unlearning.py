"""The loop on a tiny Qwen2-MoE with random rows: what it records, which passes it runs, when and how it stops."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from tasks import make_plan
from tiny import save_tiny
from torch import Tensor

from seuf_ray import config, unlearning
from seuf_ray.algorithms.ga import GradientAscent
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import JobConfig, TrainingConfig
from seuf_ray.data.batches import collate, share
from seuf_ray.data.rows import Row
from seuf_ray.engine import LocalEngine
from seuf_ray.model.moe import ALL, MoEModel
from seuf_ray.passes import Batch, Forward, Targets
from seuf_ray.plugins import Plugin
from seuf_ray.quiz import Quiz
from seuf_ray.unlearning import Monitor, Progress, Steps, Task

EXPERTS = [(1, 0), (1, 5), (2, 3)]
LAYERS = (0, 1, 2)


def random_rows(count: int, seed: int, shortest: int = 3, longest: int = 9) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [Row(tuple(torch.randint(3, 64, (n,), generator=generator).tolist())) for n in lengths]


def random_quiz(questions: int, num_choices: int, seed: int) -> Quiz:
    """Choices are continuations of one to three tokens of a common context of four."""
    rows = []
    for question in range(questions):
        (context,) = random_rows(1, seed + 100 * question, 4, 4)
        tails = random_rows(num_choices, seed + 100 * question + 1, 2, 4)
        rows += [Row((*context.ids, *tail.ids[1:]), num_context=4) for tail in tails]
    return Quiz("random", rows, [q % num_choices for q in range(questions)], num_choices)


TASK = Task(
    forget=random_rows(10, seed=1),
    retain=random_rows(7, seed=2),
    quizzes={
        "forget": [random_quiz(6, 4, seed=3)],
        "utility": [random_quiz(5, 2, seed=4), random_quiz(40, 4, seed=5)],
    },
    probes={"forget": random_rows(4, seed=6), "retain": random_rows(3, seed=7)},
    pad_id=0,
)


class Pass(NamedTuple):
    batch: Batch
    reference: bool
    grad: bool
    depth: int | None  # of what is read


class Recording(LocalEngine):
    """Remembers how it was called: each pass, the learning rate of each step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.passes: list[Pass] = []
        self.rates: list[float] = []

    def forward(self, batch: Batch, **kind: Any) -> Forward:
        self.passes.append(
            Pass(batch, kind.get("reference", False), kind.get("grad", False), kind.get("reads", ALL).depth)
        )
        return super().forward(batch, **kind)

    def step(self, learning_rate: float) -> float:
        self.rates.append(learning_rate)
        return super().step(learning_rate)


@dataclass
class Outcome:
    engine: Recording
    records: list[Progress]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.engine.tensors()

    @property
    def last(self) -> Progress:
        return self.records[-1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny(tmp_path_factory.mktemp("qwen") / "model", "qwen2_moe"))


def job(*, seed: int = 0, algorithm: Any = "ga", anchor: Any = "none", **training: Any) -> JobConfig:
    values = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "evaluate_every": 100} | training
    return config.validate(
        {"output_dir": "x", "seed": seed, "algorithm": algorithm, "anchor": anchor, "training": values}
    )


@pytest.fixture
def train(checkpoint: Checkpoint) -> Callable[..., Outcome]:
    """`train(task=..., algorithm=..., steps=...)`: the whole loop, on a fresh model."""

    def run(*, task: Task = TASK, routers: bool = True, **options: Any) -> Outcome:
        made = job(**options)
        engine = Recording(
            MoEModel(checkpoint), make_plan(checkpoint, EXPERTS, routers=routers), made.training
        )
        return Outcome(engine, list(unlearning.run(engine, made, targets(), task)))

    return run


def targets() -> Targets:
    return Targets(tuple(EXPERTS), (1, 2), LAYERS, "softmax")


# --- what is recorded ---


def test_progress_comes_at_the_start_every_so_many_steps_and_at_the_end(
    train: Callable[..., Outcome],
) -> None:
    """Seven steps, every three: 0, 3, 6, and the last."""
    found = train(steps=7, evaluate_every=3)
    assert [record.step for record in found.records] == [0, 3, 6, 7]
    assert [record.stopped for record in found.records] == [None] * 4
    assert [record.step for record in train(steps=4, evaluate_every=2).records] == [
        0,
        2,
        4,
    ]  # no last one twice


def test_every_promised_metric_is_there(train: Callable[..., Outcome]) -> None:
    start, end = train(algorithm="gdiff", anchor="kl").records
    measured = {"forget_accuracy", "utility", "nll/forget", "nll/retain"} | {
        f"{figure}/{data}/{layer}"
        for figure in ("overlap_top1", "overlap_topk", "kl")
        for data in ("forget", "retain")
        for layer in LAYERS
    }
    trained = {"loss/forget", "loss/retain", "loss/anchor", "loss/total", "grad_norm", "seconds"}
    assert set(start.metrics) == measured
    looked = {  # at the steps' own forget tokens; the anchor's gradient is looked at less often
        f"step/{figure}/{layer}"
        for figure in ("overlap_top1", "overlap_topk", "kl", "target_tokens", "target_tokens_ref")
        for layer in (1, 2)
    }
    assert set(end.metrics) == measured | trained | looked
    assert all(math.isfinite(value) for value in end.metrics.values())
    assert end.metrics["loss/total"] == pytest.approx(
        sum(end.metrics[f"loss/{name}"] for name in ("forget", "retain", "anchor")), rel=1e-6
    )
    assert end.metrics["grad_norm"] > 0 and end.metrics["seconds"] > 0


def test_at_the_start_nothing_has_drifted_and_layers_below_the_targets_never_do(
    train: Callable[..., Outcome],
) -> None:
    """Targets are in layers 1 and 2: layer 0's routing cannot change, layer 2's does."""
    start, end = train(learning_rate=3e-2).records
    for data in ("forget", "retain"):
        assert all(start.metrics[f"overlap_topk/{data}/{layer}"] == 1.0 for layer in LAYERS)
        assert all(start.metrics[f"kl/{data}/{layer}"] < 1e-6 for layer in LAYERS)
        assert end.metrics[f"overlap_topk/{data}/0"] == 1.0 and end.metrics[f"kl/{data}/0"] == 0.0
        assert end.metrics[f"kl/{data}/2"] > 1e-3


def test_accuracies_are_those_of_the_quizzes(checkpoint: Checkpoint) -> None:
    """Quizzes of 2 and 4 choices, one of them over 32 questions and so in two units; utility is the mean of its two
    sources' accuracies, not of their 45 questions. Each question alone, through the model, by a loop.
    """
    model = MoEModel(checkpoint)
    engine = LocalEngine(model, make_plan(checkpoint, EXPERTS), TrainingConfig())
    found = Monitor(engine, TASK, targets()).measure()

    def accuracy(quiz: Quiz) -> float:
        right = 0
        for question, answer in enumerate(quiz.answers):
            scores = []
            for row in quiz.rows[question * quiz.num_choices : (question + 1) * quiz.num_choices]:
                logits = model.module(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
                scores.append(
                    sum(logits[t - 1, row.ids[t]].item() for t in range(row.num_context, len(row.ids)))
                )
            right += scores.index(max(scores)) == answer
        return right / len(quiz.answers)

    assert found["forget_accuracy"] == pytest.approx(accuracy(TASK.quizzes["forget"][0]))
    two, four = (accuracy(quiz) for quiz in TASK.quizzes["utility"])
    assert found["utility"] == pytest.approx((two + four) / 2)
    assert two != four  # else a mean over questions would pass too


def test_the_recorded_loss_is_that_of_the_steps_batch(checkpoint: Checkpoint) -> None:
    """Before anything trained: minus the mean NLL, over counted tokens, of the first rows that are sampled."""
    made = job()
    engine = LocalEngine(MoEModel(checkpoint), make_plan(checkpoint, EXPERTS), made.training)
    steps = Steps(engine, made, targets(), TASK)
    rows = rows_at(steps, "forget", 1)
    batch = collate(rows, 0)
    logits = engine.model.module(
        input_ids=batch.ids, attention_mask=batch.attention.long()
    ).logits.log_softmax(-1)
    nlls = [
        -logits[b, t - 1, row.ids[t]].item() for b, row in enumerate(rows) for t in range(1, len(row.ids))
    ]
    terms, norm = steps.take(1)
    assert terms == pytest.approx(
        {name: -sum(nlls) / len(nlls) for name in ("loss/forget", "loss/total")}, rel=1e-4
    )
    assert math.isfinite(norm)


def rows_at(steps: Steps, name: str, step: int) -> list[Row]:
    """The rows of a step."""
    sampler = steps.samplers[name]
    return [getattr(steps.task, name)[i] for i in sampler.rows(sampler.batch(step - 1))]


# --- what is trained ---


def test_gradient_ascent_lowers_the_likelihood_of_forget_rows(train: Callable[..., Outcome]) -> None:
    """By more than one nat a token in twelve steps, and nothing but the plan's tensors moved."""
    found = train(steps=12)
    batch = collate(TASK.forget, 0)
    after, before = found.engine.forward(batch), found.engine.forward(batch, reference=True)
    assert after.nll() > before.nll() + 1.0
    checkpoint = found.engine.model.checkpoint
    assert set(found.tensors) == set(make_plan(checkpoint, EXPERTS).tensors)
    for name, tensor in found.tensors.items():
        assert not torch.equal(tensor, checkpoint.read(name)), name
    for name in found.engine.model.tensor_names():
        assert torch.equal(found.engine.model.view(name), checkpoint.read(name)), name


def test_a_retain_term_keeps_retain_rows_likelier(train: Callable[..., Outcome]) -> None:
    batch = collate(TASK.retain, 0)
    ascent = train(steps=12).engine.forward(batch).nll()
    difference = train(steps=12, algorithm={"name": "gdiff", "retain_weight": 3}).engine.forward(batch).nll()
    assert difference < ascent - 0.1


def test_without_its_weight_gradient_difference_trains_what_ascent_does(
    train: Callable[..., Outcome],
) -> None:
    ascent, difference = train(), train(algorithm={"name": "gdiff", "retain_weight": 0})
    for name, tensor in ascent.tensors.items():
        torch.testing.assert_close(difference.tensors[name], tensor, rtol=0, atol=1e-6)


def test_the_same_seed_trains_the_same_bits_and_another_does_not(train: Callable[..., Outcome]) -> None:
    first, again, other = (train(seed=s, algorithm="gdiff", anchor="kl", evaluate_every=2) for s in (5, 5, 6))
    for name, tensor in first.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name
    for one, two in zip(first.records, again.records, strict=True):
        assert timeless(one) == timeless(two)
    assert any(not torch.equal(other.tensors[name], tensor) for name, tensor in first.tensors.items())
    assert timeless(first.last) != timeless(other.last)
    assert timeless(first.records[0]) == timeless(other.records[0])  # nothing trained yet


def test_both_sets_are_shuffled_by_the_seed_and_not_alike(checkpoint: Checkpoint) -> None:
    """The same rows as forget and as retain set: 10 of them in 5 batches of 2, in four orders."""
    engine = LocalEngine(MoEModel(checkpoint), make_plan(checkpoint, EXPERTS), TrainingConfig())
    task, orders = replace(TASK, retain=TASK.forget), set()
    for seed in (1, 2):
        samplers = Steps(engine, job(seed=seed, batch_size=2), targets(), task).samplers
        for name in ("forget", "retain"):
            orders.add(tuple(i for step in range(5) for i in samplers[name].rows(samplers[name].batch(step))))
    assert len(orders) == 4 and all(sorted(order) == list(range(10)) for order in orders)


def timeless(record: Progress) -> tuple[int, dict[str, float], str | None]:
    return record.step, {k: v for k, v in record.metrics.items() if k != "seconds"}, record.stopped


def test_the_anchor_keeps_the_routing(train: Callable[..., Outcome]) -> None:
    """Same seed, same batches: the mean KL of the target layers on forget tokens, with and without the anchor."""
    kl = {}
    for weight in (0.0, 30.0):
        last = train(steps=15, anchor={"name": "kl", "weight": weight}).last
        kl[weight] = (last.metrics["kl/forget/1"] + last.metrics["kl/forget/2"]) / 2
    assert kl[30.0] < 0.5 * kl[0.0], kl


@pytest.mark.parametrize("kind", ["kl", "onehot"])
def test_the_routers_gradient_changes_with_the_anchors_weight(checkpoint: Checkpoint, kind: str) -> None:
    """In the engine, through its hooks: linear in the weight, and the experts' gradients change in layers above."""
    engine = LocalEngine(MoEModel(checkpoint), make_plan(checkpoint, EXPERTS), TrainingConfig())
    batch = collate(TASK.forget, 0)
    for _ in range(2):  # away from the original, where the KL anchor's gradient is 0
        engine.backward(-engine.forward(batch, grad=True).nll())
        engine.step(1e-2)
    known = {"forget_ref": engine.forward(batch, reference=True), "targets": targets()}

    def gradient(weight: float) -> Tensor:
        anchor = job(anchor={"name": kind, "weight": weight}).anchor
        known["forget"] = engine.forward(batch, grad=True)
        terms = unlearning._call(GradientAscent(), known) | unlearning._call(anchor, known)
        return torch.autograd.grad(sum(terms.values()), engine.trainable.routers["1"].weight)[0]

    none, one, two = gradient(0), gradient(1), gradient(2)
    assert (one - none).abs().max() > 1e-3 * none.abs().max() > 0
    torch.testing.assert_close(two - one, one - none, rtol=1e-3, atol=1e-5)


def test_a_plan_without_routers_leaves_them_alone(train: Callable[..., Outcome]) -> None:
    """The frozen anchor: the routers are no parameters at all, and target layers route as before at the first one."""
    found = train(anchor="frozen", routers=False, learning_rate=3e-2)
    assert not any(name.endswith("mlp.gate.weight") for name in found.tensors)
    checkpoint = found.engine.model.checkpoint
    assert all(not torch.equal(tensor, checkpoint.read(name)) for name, tensor in found.tensors.items())
    for layer in LAYERS:
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(found.engine.model.view(name), checkpoint.read(name))
    assert found.last.metrics["kl/forget/1"] < 1e-9  # nothing below it moved
    assert found.last.metrics["kl/forget/2"] > 1e-4  # drift that freezing cannot stop


def test_an_engine_tells_the_batches_of_one_trial_from_those_of_the_next(checkpoint: Checkpoint) -> None:
    """What frozen layers compute is kept by the batch's name: other seeds and sizes must have other names. A plan in
    the last layer, so that two layers are kept; rows of one length, so that batches differ in nothing but content.
    """
    task = replace(TASK, forget=random_rows(12, seed=8, shortest=6, longest=6))
    plan = make_plan(checkpoint, [(2, 3)])
    shared = LocalEngine(MoEModel(checkpoint), plan, job().training)
    start = shared.state()
    for options in ({"seed": 1}, {"seed": 2}, {"seed": 2, "batch_size": 6}, {"seed": 2, "batch_size": 4}):
        made = job(anchor="kl", **options)
        fresh = LocalEngine(MoEModel(checkpoint), plan, made.training)
        shared.load_state(start)
        found, expected = (
            [steps.take(step) for step in (1, 2, 3)]
            for steps in (Steps(engine, made, targets(), task) for engine in (shared, fresh))
        )
        assert found == expected, options


# --- which passes run ---


@pytest.mark.parametrize(
    ("algorithm", "anchor", "references", "trained"),
    [
        ("ga", "none", 0, ["forget"]),
        ("ga", "frozen", 0, ["forget"]),
        ("ga", "onehot", 0, ["forget"]),
        ("ga", "kl", 1, ["forget"]),
        ("gdiff", "none", 0, ["forget", "retain"]),
        ("gdiff", "kl", 1, ["forget", "retain"]),
    ],
)
def test_only_the_passes_that_a_loss_names_run(
    checkpoint: Checkpoint, algorithm: str, anchor: str, references: int, trained: list[str]
) -> None:
    """References first, without gradients; then the others, once each, over rows of their own set."""
    made = job(algorithm=algorithm, anchor=anchor)
    engine = Recording(MoEModel(checkpoint), make_plan(checkpoint, EXPERTS), made.training)
    steps = Steps(engine, made, targets(), TASK)
    for step in (1, 2):
        engine.passes.clear()
        steps.take(step)
        kinds = [(one.reference, one.grad) for one in engine.passes]
        assert kinds == [(True, False)] * references + [(False, True)] * len(trained)
        batches = [one.batch for one in engine.passes]
        for name, batch in zip(trained, batches[references:], strict=True):
            assert torch.equal(batch.ids, collate(rows_at(steps, name, step), 0).ids)
        depths = [3] * references + [None] * len(
            trained
        )  # an anchor reads no layer above its routers 1 and 2
        assert [one.depth for one in engine.passes] == depths
        if references:
            assert torch.equal(batches[0].ids, batches[1].ids)  # forget_ref sees what forget sees


def test_an_evaluation_runs_one_pass_per_probe_and_per_32_questions(checkpoint: Checkpoint) -> None:
    """Two probes of the original, once; then each time 2 probes, 6 and 5 questions in a unit each, 40 in two: 6."""
    engine = Recording(MoEModel(checkpoint), make_plan(checkpoint, EXPERTS), TrainingConfig())
    monitor = Monitor(engine, TASK, targets())
    assert [one.reference for one in engine.passes] == [True, True]
    for _ in range(2):
        engine.passes.clear()
        monitor.measure()
        assert [(one.reference, one.grad) for one in engine.passes] == [(False, False)] * 6


def test_the_learning_rate_warms_up_and_stays(train: Callable[..., Outcome]) -> None:
    """Over 4 steps to 8e-3: 2e-3, 4e-3, 6e-3, 8e-3, and 8e-3 from there on; without warm-up at once."""
    found = train(steps=6, learning_rate=8e-3, warmup_steps=4)
    assert found.engine.rates == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 8e-3, 8e-3])
    assert train(steps=2, learning_rate=8e-3).engine.rates == [8e-3, 8e-3]


# --- when it stops ---


def test_the_floor_of_forget_accuracy_stops_it_with_a_reason(
    checkpoint: Checkpoint, train: Callable[..., Outcome]
) -> None:
    """Questions whose right choice is what the original thinks, so it starts at 1; the right choices are what is
    forgotten, so at most half of them are still preferred some evaluation later.
    """
    asked = random_quiz(8, 4, seed=11)
    scores = MoEModel(checkpoint).forward(collate(asked.rows, 0)).sequence_logps()
    answers = scores.view(8, 4).argmax(dim=1).tolist()
    forget = [asked.rows[4 * question + answer] for question, answer in enumerate(answers)]
    task = replace(TASK, forget=forget, quizzes={"forget": [replace(asked, answers=answers)], "utility": []})
    found = train(task=task, steps=40, evaluate_every=2, stop_at_forget_accuracy=0.5)
    accuracies = [record.metrics["forget_accuracy"] for record in found.records]
    assert accuracies[0] == 1.0 and accuracies[-1] <= 0.5 < min(accuracies[:-1])
    assert 0 < found.last.step < 40 and len(found.engine.rates) == found.last.step == found.last.kept
    reason = f"forget accuracy {accuracies[-1]:.3f} reached the floor 0.5 at step {found.last.step}"
    assert [record.stopped for record in found.records] == [None] * (len(found.records) - 1) + [reason]


def test_above_the_floor_it_goes_on_and_at_the_floor_it_does_not_begin(train: Callable[..., Outcome]) -> None:
    """A question with one choice is always answered right: accuracy stays 1."""
    certain = replace(TASK, quizzes={"forget": [Quiz("sure", [Row((3, 4))], [0], 1)], "utility": []})
    found = train(task=certain, steps=2, stop_at_forget_accuracy=0.99)
    assert (found.last.step, found.last.stopped, found.last.kept) == (2, None, 2)
    assert found.last.metrics["forget_accuracy"] == 1.0
    assert math.isnan(found.last.metrics["utility"])  # no source, no figure
    there = train(task=certain, steps=2, stop_at_forget_accuracy=1.0)
    assert [record.step for record in there.records] == [0] and there.engine.rates == []
    assert there.last.stopped is not None and there.last.kept == 0


class BreaksAtThree(Plugin):
    """Gradient ascent whose third loss of a run is `value`; or whose gradient is infinite at a finite loss."""

    name: str = "breaks"
    value: Any = None
    taken: list[int] = []  # noqa: RUF012 - pydantic copies it for each instance

    def loss(self, forget: Forward) -> dict[str, Tensor]:
        self.taken.append(1)
        forget_term, extra = -forget.nll(), forget.logps.sum() * 0.0
        if len(self.taken) == 3:
            extra = extra.sqrt() if self.value is None else extra + self.value
        return {"forget": forget_term, "extra": extra}


@pytest.mark.parametrize(
    ("value", "culprit"),
    [
        (math.nan, "loss/extra, loss/total at step 3, the routing up to layer 2 is finite"),
        (math.inf, "loss/extra, loss/total at step 3, the routing up to layer 2 is finite"),
        (-math.inf, "loss/extra, loss/total at step 3, the routing up to layer 2 is finite"),
        (None, "the gradient norm at step 3, in the gradient of layer"),
    ],
)
def test_a_loss_that_breaks_stops_it_and_keeps_the_state_before(
    train: Callable[..., Outcome], value: float | None, culprit: str
) -> None:
    """Step 3 is not taken: the tensors are, bit for bit, those of a run of two steps. sqrt(0)'s gradient is 0/0."""
    found = train(steps=9, algorithm=BreaksAtThree(value=value))
    assert [record.step for record in found.records] == [0, 3]
    assert found.last.stopped is not None
    assert found.last.stopped.startswith(f"non-finite {culprit}")
    assert found.last.stopped.endswith("; the state before it is kept (lower training.learning_rate?)")
    assert found.last.kept == 2 and found.records[0].kept is None
    assert math.isfinite(found.last.metrics["loss/forget"]) and math.isfinite(found.last.metrics["utility"])
    expected = train(steps=2).tensors
    for name, tensor in found.tensors.items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, expected[name]), name


def test_an_absurd_learning_rate_stops_it_with_a_reason(train: Callable[..., Outcome]) -> None:
    """One step of 1e30 makes finite tensors whose products are not: the next loss says so, and they are not kept."""
    found = train(steps=9, learning_rate=1e30)
    assert found.last.stopped is not None and found.last.step == 2
    assert (
        "non-finite loss/forget, loss/total at step 2, first seen at the router of layer 2"
        in found.last.stopped
    )
    assert found.last.kept == 0
    original = train(steps=1, learning_rate=1e-12).tensors
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, original[name], atol=1e-9, rtol=0)


# --- several ranks ---


class Rank(LocalEngine):
    """One of several ranks, which are threads: sums wait for all, gradients are averaged, experts are not shared."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier, *args: Any) -> None:
        super().__init__(*args)
        self.rank, self.world_size, self.table, self.barrier = rank, len(table), table, barrier

    def total(self, values: Tensor) -> Tensor:
        self.table[self.rank] = values.detach().clone()
        self.barrier.wait(60)
        summed = torch.stack(list(self.table)).sum(dim=0)
        self.barrier.wait(60)
        return summed

    def step(self, learning_rate: float) -> float:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad = self.total(parameter.grad) / self.world_size
        return super().step(learning_rate)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_several_ranks_train_and_measure_what_one_does(
    checkpoint: Checkpoint, train: Callable[..., Outcome], batch_size: int
) -> None:
    """Three ranks: a batch of 1 leaves two with fillers; 5 rows are 2, 2 and 1, 4 are 2, 1 and 1. 6 questions are
    one unit, so two ranks answer questions that do not count; of 4 and 3 probes each rank has one or two.
    """
    options = {"algorithm": "gdiff", "anchor": "kl", "batch_size": batch_size, "evaluate_every": 2}
    alone = train(**options)
    barrier, table = threading.Barrier(3), [None] * 3
    made, plan = job(**options), make_plan(checkpoint, EXPERTS)

    def work(rank: int) -> Outcome:
        engine: Any = Rank(rank, table, barrier, MoEModel(checkpoint), plan, made.training)
        return Outcome(engine, list(unlearning.run(engine, made, targets(), TASK)))

    with ThreadPoolExecutor(3) as pool:
        ranks = list(pool.map(work, range(3)))
    for found in ranks:
        assert [record.step for record in found.records] == [0, 2, 3]
        for ours, expected in zip(found.records, alone.records, strict=True):
            assert timeless(ours)[1] == pytest.approx(timeless(expected)[1], rel=2e-3, abs=1e-5)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=2e-4)


def test_fewer_rows_than_ranks_give_a_filler_that_counts_nothing(checkpoint: Checkpoint) -> None:
    """Three rows on five ranks: one each, and two fillers of the first row, with finite passes and gradients of 0."""
    rows, model = TASK.forget[:3], MoEModel(checkpoint)
    engine = LocalEngine(model, make_plan(checkpoint, EXPERTS), TrainingConfig())
    for rank in range(5):
        batch = share(rows, rank, 5, pad_id=0)
        assert batch.is_filler == (rank >= 3)
        assert batch.ids.tolist() == [list(rows[rank if rank < 3 else 0].ids)]
        if not batch.is_filler:
            assert batch.counted.sum() == len(rows[rank].ids) - 1
            continue
        assert not batch.counted.any() and not batch.routed.any() and batch.attention.all()
        counts = (2.0, 0.6, 3.0)  # of the whole batch, per rank
        passed = model.forward(batch, counts)
        assert torch.isfinite(passed.logps).all() and passed.nll() == 0
        assert all(len(logits) == 0 for logits in passed.router_logits.values())
        assert engine.counts([batch]) == (0.0, 0.0, 0.0)
        assert engine.counts([batch, collate(rows, 0)]) == engine.counts([collate(rows, 0)])


def test_rows_are_shared_out_without_loss(checkpoint: Checkpoint) -> None:
    """Ten rows on three ranks: 4, 3 and 3, each row once."""
    seen = []
    for rank in range(3):
        batch = share(TASK.forget, rank, 3, pad_id=0)
        lengths = batch.attention.sum(dim=1).tolist()
        seen += [tuple(ids[:n]) for ids, n in zip(batch.ids.tolist(), lengths, strict=True)]
    assert sorted(seen) == sorted(row.ids for row in TASK.forget)
    assert len(seen) == 10
