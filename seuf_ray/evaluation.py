"""Multiple-choice scoring, perplexity, routing drift and ROUGE-L: tensors and strings in, (sum, count) out.

    choice = argmax_c  sum_t log p(continuation_c[t] | question, continuation_c[<t])
    drift  = 1 - overlap of the experts chosen by the original and by the current router

Sums are rounded to multiples of 2**-28 before they leave this file. Floats on such a grid add without error
(up to 3e7), so units merged in any order, on any number of actors, give the same bits.

The log-likelihood rule is lm-evaluation-harness' (`_encode_pair`), with its unnormalised accuracy (`acc`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seuf_ray import routing
from seuf_ray.artifacts import CurvePoint, Statistic
from seuf_ray.data.rows import Question, Row, Tokenizer, leading_tokens
from seuf_ray.errors import ConfigError, DataError
from seuf_ray.families import Scoring
from seuf_ray.passes import Forward

GRID = 2.0**-28
Drift = dict[str, dict[int, Statistic]]  # overlap_top1, overlap_topk, kl -> layer


def merge(a: Statistic, b: Statistic) -> Statistic:
    """The statistic of both parts together."""
    return Statistic(sum=a.sum + b.sum, count=a.count + b.count)


def grid_sum(values: Tensor) -> Tensor:
    """Sum over the last axis of `values` (..., N) in float64, rounded to the grid."""
    return (values.sum(dim=-1, dtype=torch.float64) / GRID).round() * GRID


def statistic(values: Tensor) -> Statistic:
    """Sum on the grid, and count, of `values` (N,)."""
    return Statistic(sum=float(grid_sum(values)), count=values.numel())


# --- multiple choice ---


def question_rows(
    question: Question,
    tokenizer: Tokenizer,
    question_format: Literal["cloze", "letters"],
    max_length: int | None = None,
) -> list[Row]:
    """One row per choice, in which only the continuation's tokens count.

    cloze: the question, continued by " " + choice. letters: MMLU's prompt without examples (question, lines
    "A. ...", "Answer:"), continued by " A", " B", ... Spaces that end a context move to the continuation. The
    two are tokenised together if the tokens of the context begin the result, else apart. A row longer than
    `max_length` loses the beginning of its context, but never a leading bos.

    Raises:
        DataError: a choice that tokenises to nothing or does not fit into `max_length`.
    """
    context, continuations = _prompt(question, question_format)
    stripped = context.rstrip()
    leading, head = leading_tokens(tokenizer), _ids(tokenizer, stripped)
    if not leading and not head:  # the first counted token needs a predecessor
        leading = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][
            :1
        ]
    rows = []
    for continuation in continuations:
        tail = _tail(tokenizer, stripped, head, context[len(stripped) :] + continuation)
        room = len(head) if max_length is None else max_length - len(leading) - len(tail)
        kept = head[max(len(head) - room, 0) :]
        if not tail or room < 0 or not (leading or kept):
            problem = f"has {len(tail)} tokens; allowed: 1 to {max_length or 'any'}, with a token of context"
            raise DataError(f"choice {continuation!r} of question {question.question[:60]!r} {problem}")
        rows.append(Row((*leading, *kept, *tail), num_context=len(leading) + len(kept)))
    return rows


def _prompt(question: Question, question_format: str) -> tuple[str, list[str]]:
    """(context, continuations) as text."""
    if question_format == "cloze":
        return question.question, [f" {choice}" for choice in question.choices]
    letters = [chr(ord("A") + index) for index in range(len(question.choices))]
    listed = [f"{letter}. {choice}" for letter, choice in zip(letters, question.choices, strict=True)]
    return "\n".join([question.question.strip(), *listed, "Answer:"]), [f" {letter}" for letter in letters]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _tail(tokenizer: Tokenizer, context: str, head: list[int], continuation: str) -> list[int]:
    """Tokens of the continuation after a context whose tokens are `head`."""
    whole = _ids(tokenizer, context + continuation)
    return whole[len(head) :] if whole[: len(head)] == head else _ids(tokenizer, continuation)


def choose(scores: Tensor, num_choices: int | Sequence[int]) -> Tensor:
    """(Q,) index of the best choice, of equals the lowest; -1 where a score is NaN or none is finite.

    Args:
        scores: (Q*C,) log-probabilities, the choices of a question next to each other.
        num_choices: C, or one number per question where they differ.
    """
    if isinstance(num_choices, int):
        table = scores.reshape(-1, num_choices)  # (Q, C)
    else:
        parts = torch.split(scores, list(num_choices))
        table = pad_sequence(list(parts), batch_first=True, padding_value=-math.inf)
    best, index = table.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf).max(dim=1)
    return torch.where(best.isfinite() & ~table.isnan().any(dim=1), index, -1)


def accuracy(sequence_logps: Tensor, answers: Sequence[int], num_choices: int | Sequence[int]) -> Statistic:
    """(right answers, questions) by summed log-probabilities (Q*C,); NaN never counts as right."""
    chosen = choose(sequence_logps, num_choices)
    return statistic(chosen == torch.tensor(answers, dtype=chosen.dtype, device=chosen.device))


# --- perplexity and routing drift ---


def nll_statistic(logps: Tensor, mask: Tensor) -> Statistic:
    """Summed NLL of the tokens (B, T-1) that `mask` counts, in float64; exp(mean) is the perplexity."""
    return statistic(-logps[mask])


def drift(reference: Forward, current: Forward, scoring: Scoring) -> Drift:
    """How far the routing of the same tokens moved, by layer: shares that stayed, KL to the original."""
    result: Drift = {"overlap_top1": {}, "overlap_topk": {}, "kl": {}}
    for layer, logits in current.router_logits.items():
        before = reference.router_logits[layer], reference.router_choices[layer]  # (N, E), (N, K)
        moved = routing.drift(*before, logits, current.router_choices[layer], scoring)
        for figure, values in moved.items():
            result[figure][layer] = statistic(values)
    return result


def merge_drift(a: Drift, b: Drift) -> Drift:
    """Drift over the tokens of both; either may be empty, {}."""
    if not a or not b:
        return a or b
    return {name: {layer: merge(a[name][layer], b[name][layer]) for layer in a[name]} for name in a}


# --- generated text, curves ---


def rouge_l_recall(prediction: str, reference: str) -> float:
    """Share of the reference's words, in order, that the prediction has (with stemming, as TOFU does).

    Raises:
        ConfigError: the package `rouge-score` is not installed.
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].recall)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError("ROUGE-L needs the extra 'eval': pip install 'seuf-ray[eval]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def interpolate_utility(curve: Sequence[CurvePoint], level: float) -> float | None:
    """Utility where forget accuracy first falls to `level`, linear between two points; None if never."""
    known = [point for point in curve if not math.isnan(point.forget_accuracy)]
    points = sorted(known, key=lambda point: point.step)
    if points and points[0].forget_accuracy <= level:
        return points[0].utility
    for before, after in pairwise(points):
        if after.forget_accuracy <= level:
            fell = before.forget_accuracy - after.forget_accuracy
            fraction = (before.forget_accuracy - level) / fell
            return before.utility + fraction * (after.utility - before.utility)
    return None
