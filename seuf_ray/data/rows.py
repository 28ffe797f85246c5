"""Sources -> texts and questions -> token rows.

A row is `ids` with `num_context`: log-probabilities of `ids[num_context:]` count. Everything here is a pure
function of its arguments: every worker gets the same units and batches, and a step can be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from seuf_ray.artifacts import DataSummary
from seuf_ray.config import DataConfig
from seuf_ray.data.sources import Found, Reading
from seuf_ray.errors import DataError

QUESTION_NAMES = ("question", "query")  # TOFU and MMLU, RWKU
SURROGATE = re.compile("[\ud800-\udfff]")
CHOICE_COLUMN = re.compile(r"(choice|option)(\d+)")  # MMLU as CSV, TOFU's real_authors


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_texts(source: str, config: DataConfig) -> tuple[list[str], Found]:
    """The texts of `source`, in order, and what was found.

    A text is the column `config.text_field`. Where a record has no such column but a question and an answer
    (TOFU, RWKU, MMLU), it is "Question: {question}\\nAnswer: {answer}", which is TOFU's own template for base
    models; the answer is the text of the right choice.

    Raises:
        DataError: no such source, no usable row, or more malformed rows than `config.max_bad_rows`.
    """
    return stream_texts(source, config).collect()


def stream_texts(source: str, config: DataConfig) -> Reading[str]:
    """The same texts one by one, in whatever memory one record takes; errors come where they are found."""
    return Reading(source, config, lambda record: _text_of(record, config.text_field))


def read_questions(source: str, config: DataConfig) -> tuple[list[Question], Found]:
    """The multiple-choice questions of `source`, in order, and what was found.

    A record has `question` (or `query`), `answer`, and a list `choices` (WMDP, MMLU) or columns choice0,
    choice1, ... (MMLU as CSV) or option1, option2, ... (TOFU). The answer is an index from 0, a letter, or
    the text of the right choice; "2" is an index where there are columns from choice0, else a text.
    `config.max_rows` is about texts and limits no questions.

    Raises:
        DataError: as in `read_texts`.
    """
    return Reading(source, config, _question_of, questions=True).collect()


def _text_of(record: Any, text_field: str) -> str:
    fields = _object(record)
    if text_field in fields:
        return _string(text_field, fields[text_field])
    names = [name for name in QUESTION_NAMES if name in fields]
    if not names or "answer" not in fields:
        raise ValueError(f"no column {text_field!r} (data.text_field), found {_names(fields)}")
    if _choice_columns(
        fields
    ):  # the answer may be a number there, and numbers are not what must be forgotten
        question = _question_of(fields)
        return f"Question: {question.question}\nAnswer: {question.choices[question.answer]}"
    return f"Question: {_string(names[0], fields[names[0]])}\nAnswer: {_string('answer', fields['answer'])}"


def _question_of(record: Any) -> Question:
    fields = _object(record)
    columns = _choice_columns(fields)
    names = [name for name in QUESTION_NAMES if name in fields]
    if not (columns and names and "answer" in fields):
        raise ValueError(f"a question needs columns question, choices and answer, found {_names(fields)}")
    choices = fields["choices"] if "choices" in fields else [fields[name] for name in columns]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"choices must be a list of two texts or more, found {_short(choices)}")
    texts = tuple(_string(f"choice {index}", choice) for index, choice in enumerate(choices))
    return Question(
        _string(names[0], fields[names[0]]), texts, _answer_index(fields["answer"], texts, columns)
    )


def _choice_columns(fields: dict[str, Any]) -> list[str]:
    """["choices"], or the numbered columns in the order of their numbers, or nothing."""
    matches = [match for match in map(CHOICE_COLUMN.fullmatch, fields) if match]
    numbered = [match[0] for match in sorted(matches, key=lambda match: int(match[2]))]
    return ["choices"] if "choices" in fields else numbered


def _answer_index(answer: Any, choices: tuple[str, ...], columns: list[str]) -> int:
    """Index of the right choice; raises ValueError where the answer names no choice, or two."""
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    numbers = [name.removeprefix("choice") for name in columns] if "choice0" in columns else []
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = {answer} & set(range(len(choices)))
    elif answer in numbers:  # CSV knows no integers: "2" is the column choice2, even where a choice reads "2"
        found = {numbers.index(answer)}
    else:
        found = {known.index(answer) for known in (letters, list(choices)) if answer in known}
    if len(found) != 1:
        problem = "is a letter and also the text of another choice" if found else "names no choice"
        allowed = f"0 to {len(choices) - 1}, A to {letters[-1]}, or the text of a choice"
        raise ValueError(f"answer {_short(answer)} {problem}; allowed: {allowed}")
    return found.pop()


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"expected a record with columns, found {_short(record)}")
    return record


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty, found {_short(value)}")
    if SURROGATE.search(value):  # half an escaped pair, or a byte that is not UTF-8: tokenizers crash on it
        raise ValueError(f"{name} is not valid Unicode: {_short(value)}")
    return value


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(list(fields)[:12]) + (", ..." if len(fields) > 12 else "")


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


@dataclass(frozen=True)
class Row:
    """Tokens; log-probabilities of `ids[num_context:]` count (of none where num_context is their number)."""

    ids: tuple[int, ...]
    num_context: int = 1

    def __post_init__(self) -> None:
        assert 1 <= self.num_context <= len(self.ids), "the first token has no predecessor: it cannot count"


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """[bos] where the tokenizer has one and puts it before texts, else []."""
    first = list(tokenizer("a", add_special_tokens=True)["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


def padding_id(tokenizer: Tokenizer) -> int:
    """The tokenizer's padding, else its end of text; masks, not ids, say what is padding."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, sequence_length: int) -> list[Row]:
    """Rows of at most `sequence_length` tokens in the order of the texts: [bos] tokens [eos], cut if longer.

    A last piece of one token is dropped, as nothing in it could count: the eos, where there is one.

    Raises:
        DataError: no text gives a row.
    """
    rows = [Row(piece) for pieces in tokenized(texts, tokenizer, sequence_length) for piece in pieces]
    if not rows:
        raise DataError(f"{len(texts)} texts tokenise to nothing: no row of two tokens or more is left")
    return rows


def tokenized(
    texts: Iterable[str], tokenizer: Tokenizer, sequence_length: int
) -> Iterator[list[tuple[int, ...]]]:
    """For each text the tokens of its rows, none where it tokenises to nothing; see `tokenize`."""
    frame = _frame(tokenizer)
    for text in texts:
        yield _pieces(_ids(text, tokenizer), *frame, sequence_length)


def idk_rows(texts: Sequence[str], tokenizer: Tokenizer, sequence_length: int, answer: str) -> list[Row]:
    """For each row of `tokenize`, in the same order, one that begins as it does and goes on with `answer`.

    They part after "Answer:" where the row has that line of a question's text, else in the middle of the row.
    """
    first, last = _frame(tokenizer)
    end = [*_ids(f" {answer}", tokenizer), *last]
    rows: list[Row] = []
    for text in texts:
        prompt, line, _ = text.partition("\nAnswer:")
        num_prompt = len(first) + len(_ids(prompt + line, tokenizer)) if line else 0
        for at, piece in enumerate(_pieces(_ids(text, tokenizer), first, last, sequence_length)):
            own = num_prompt - at * sequence_length
            kept = own if 0 < own < len(piece) else len(piece) // 2
            rows.append(Row((*piece[: max(1, min(kept, sequence_length - len(end)))], *end)))
    return rows


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and after the tokens of a text."""
    eos = tokenizer.eos_token_id
    return leading_tokens(tokenizer), [] if eos is None else [eos]


def _pieces(
    tokens: list[int], first: list[int], last: list[int], sequence_length: int
) -> list[tuple[int, ...]]:
    """The rows of one text."""
    ids = (*first, *tokens, *last) if tokens else ()
    pieces = (ids[start : start + sequence_length] for start in range(0, len(ids), sequence_length))
    return [piece for piece in pieces if len(piece) >= 2]


def summarize(sources: Sequence[str], found: Sequence[Found], rows: Sequence[Row]) -> DataSummary:
    """What the readers found and what became of it; `num_tokens` counts every token of the rows."""
    return DataSummary(
        sources=list(sources),
        num_texts=sum(one.num_records for one in found),
        num_rows=len(rows),
        num_tokens=sum(len(row.ids) for row in rows),
        num_bad_rows=sum(one.num_bad for one in found),
        first_bad=next((one.first_bad for one in found if one.num_bad), ""),
    )
