"""A question source, tokenised: sampled evenly for small evaluations, and cut into units for large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from seuf_ray.data.rows import Question, Row, Tokenizer
from seuf_ray.errors import DataError
from seuf_ray.evaluation import question_rows


@dataclass(frozen=True)
class Quiz:
    """Questions with the same number of choices.

    Attributes:
        source: where they came from.
        rows: num_choices rows per question, one question after another.
        answers: index of each question's right choice.
        num_choices: C.
    """

    source: str
    rows: list[Row]
    answers: list[int]
    num_choices: int

    def take(self, questions: Sequence[int]) -> Quiz:
        """Only these questions."""
        c = self.num_choices
        rows = [row for q in questions for row in self.rows[q * c : (q + 1) * c]]
        return Quiz(self.source, rows, [self.answers[q] for q in questions], c)

    def sample(self, most: int) -> Quiz:
        """At most `most` questions, evenly spaced, so that every kind in a sorted source is there."""
        n = len(self.answers)
        return self if n <= most else self.take([i * n // most for i in range(most)])

    def units(self, unit_questions: int) -> list[Quiz]:
        """Fixed groups in order, each for one forward pass."""
        n = len(self.answers)
        return [self.take(range(i, min(i + unit_questions, n))) for i in range(0, n, unit_questions)]


def make_quiz(
    source: str,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    question_format: Literal["cloze", "letters"],
) -> Quiz:
    """Tokenise `questions`.

    Raises:
        DataError: they differ in their number of choices.
    """
    num_choices = len(questions[0].choices)
    for number, question in enumerate(questions, start=1):
        if len(question.choices) != num_choices:
            raise DataError(
                f"{source}: question {number} has {len(question.choices)} choices, the first has {num_choices}; "
                "all questions of a source must have the same number"
            )
    rows = [row for question in questions for row in question_rows(question, tokenizer, question_format)]
    return Quiz(source, rows, [question.answer for question in questions], num_choices)
