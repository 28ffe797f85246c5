"""The robustness tests of a cell: what of the forget set comes back, and what rounding does.

Every figure is forget accuracy on the test half, unless its name says utility; `robustness.py` says what is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seuf_ray.artifacts import provenance
from seuf_ray.attribution.selection import choose_targets
from seuf_ray.config import JobConfig, TargetsConfig
from seuf_ray.data.rows import Question
from seuf_ray.embedded.paraphrases import paraphrased
from seuf_ray.engine import LocalEngine
from seuf_ray.model.moe import MoEModel
from seuf_ray.paper.splits import part_of, sampled, sentences_of
from seuf_ray.quiz import Quiz, make_quiz
from seuf_ray.robustness import accuracy, forced, is_inverted, plainly, quantised_experts, relearn

if TYPE_CHECKING:
    from seuf_ray.paper.experiment import Materials

RELEARNING_STEPS = 20
RELEARNING_RATE = 3e-4  # of the fixed protocol's `full`, for all parameters
BITS = (8, 4)


def attack(engine: LocalEngine, materials: Materials, config: JobConfig) -> dict[str, float | bool]:
    """Everything that is tried on the model that `engine` trained; the engine itself stays as it is."""
    job, most = materials.job, materials.settings.measuring.final
    forget, utility = (sampled(q, "test", most) for q in (job.forget_quizzes, job.utility_quizzes))
    unlearned = MoEModel(job.checkpoint)
    unlearned.exchange(engine.tensors())
    found: dict[str, float | bool] = {}
    for bits in BITS:
        with quantised_experts(unlearned, bits):
            found[f"int{bits}"] = accuracy(plainly(unlearned), forget, job.pad_id)
            found[f"int{bits}_utility"] = accuracy(plainly(unlearned), utility, job.pad_id)
    found["forced_routing"] = accuracy(forced(MoEModel(job.checkpoint), unlearned), forget, job.pad_id)
    found["paraphrase"] = accuracy(plainly(unlearned), _paraphrases(materials, most), job.pad_id)
    plain = accuracy(plainly(unlearned), forget, job.pad_id)
    found["inverted"] = is_inverted(plain, sum(len(quiz.answers) for quiz in forget))
    found["relearned"] = _relearned(unlearned, materials, config, forget)
    return found


def _paraphrases(materials: Materials, most: int) -> list[Quiz]:
    """One quiz for each other wording, of test questions."""
    job = materials.job
    quizzes = []
    for source in job.config.forget_questions:
        for number, records in enumerate(paraphrased(source.removeprefix("embedded:"))):
            asked = [Question(r["question"], tuple(r["choices"]), r["answer"]) for r in records]
            quizzes.append(make_quiz(f"{source}/{number}", asked, job.tokenizer, "cloze"))
    return [part_of(quiz, "test").sample(most) for quiz in quizzes]


def _relearned(unlearned: MoEModel, materials: Materials, config: JobConfig, forget: list[Quiz]) -> float:
    """Accuracy on test facts after all parameters were trained on validation facts; `unlearned` is used up."""
    job = materials.job
    made = provenance(config.seed, attribution=materials.report.fingerprint)
    plan = choose_targets(materials.report, TargetsConfig(scope="full"), job.checkpoint, made)
    engine = LocalEngine(unlearned, plan, config.training, config.engine)
    total = sum(len(quiz.answers) for quiz in job.forget_quizzes)
    rows = sentences_of(job.forget.rows, total, "validation")
    relearn(engine, rows, RELEARNING_STEPS, RELEARNING_RATE, job.pad_id, config.seed)
    return accuracy(plainly(unlearned), forget, job.pad_id)
