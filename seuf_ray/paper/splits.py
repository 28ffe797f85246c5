"""Which questions choose, and which judge: every second question of a source is `validation`, the others are `test`.

The questions of the embedded domains are sorted by attribute, then subject, and have `len(texts) / len(questions)`
training sentences each, in the same order. So a split of the questions is one of the facts, too: relearning trains on
the sentences of validation facts and asks test questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from seuf_ray.errors import DataError
from seuf_ray.quiz import Quiz

T = TypeVar("T")
Split = Literal["validation", "test"]
FIRST: dict[str, int] = {"validation": 0, "test": 1}


def part_of(quiz: Quiz, split: Split) -> Quiz:
    """The questions of one half."""
    return quiz.take(range(FIRST[split], len(quiz.answers), 2))


def sampled(quizzes: Sequence[Quiz], split: Split, most: int) -> list[Quiz]:
    """Of each quiz its part of `most` questions of that half, evenly spaced."""
    return [part_of(quiz, split).sample(max(1, most // len(quizzes))) for quiz in quizzes]


def sentences_of(rows: Sequence[T], num_questions: int, split: Split) -> list[T]:
    """The training rows whose facts are asked for in that half.

    Raises:
        DataError: the rows are not the same number for each question.
    """
    each, rest = divmod(len(rows), num_questions)
    if rest or not each:
        raise DataError(f"{len(rows)} texts are not the same number for each of {num_questions} questions")
    return [row for i, row in enumerate(rows) if (i // each) % 2 == FIRST[split]]
