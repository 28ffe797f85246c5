"""Scoring against arithmetic done by hand, naive loops, and lm-evaluation-harness' rule written out again."""

from __future__ import annotations

import math
import random
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import TOKENIZER, WITH_BOS, byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from seuf_ray import evaluation
from seuf_ray.artifacts import CurvePoint, Statistic
from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Question
from seuf_ray.errors import ConfigError, DataError
from seuf_ray.evaluation import question_rows
from seuf_ray.passes import Forward

SKY = Question("The sky is", ("blue", "green"), 0)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Knows "a", " ", "b", and "a b" as one token: there, a context and its continuation merge."""
    vocabulary = {"<eos>": 0, "a": 1, "Ġ": 2, "b": 3, "aĠ": 4, "aĠb": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "Ġ"), ("aĠ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def harness_pair(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness' `_encode_pair`, from its description."""
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = TOKENIZER(context + continuation, add_special_tokens=False)["input_ids"]
    head = TOKENIZER(context, add_special_tokens=False)["input_ids"]
    return head, whole[len(head) :]


class TestQuestionRows:
    def test_only_the_continuation_counts(self) -> None:
        """A byte a token: "The sky is" is 10 tokens of context, " blue" 5 that count."""
        rows = question_rows(SKY, TOKENIZER, "cloze")
        assert [TOKENIZER.decode(row.ids) for row in rows] == ["The sky is blue", "The sky is green"]
        assert [row.num_context for row in rows] == [10, 10]
        batch = collate(rows, pad_id=0)
        assert TOKENIZER.decode(batch.ids[0][batch.counted[0]]) == " blue"

    def test_letters(self) -> None:
        rows = question_rows(Question(" Sky? ", ("blue", "green"), 0), TOKENIZER, "letters")
        prompt = "Sky?\nA. blue\nB. green\nAnswer:"
        assert [TOKENIZER.decode(row.ids) for row in rows] == [f"{prompt} A", f"{prompt} B"]
        assert {row.num_context for row in rows} == {len(prompt)}

    @given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=5))
    @settings(max_examples=60, deadline=None)
    def test_is_the_harness_rule(self, question: str, choice: str) -> None:
        question, choice = (text.encode(errors="ignore").decode() or "x" for text in (question, choice))
        head, tail = harness_pair(question, f" {choice}")
        row = question_rows(Question(question, (choice, "x"), 0), TOKENIZER, "cloze")[0]
        assert list(row.ids) == (head or [TOKENIZER.bos_token_id]) + tail  # a context of nothing is a bos
        assert row.num_context == len(head or [0])

    def test_tokens_that_merge_across_the_border_are_made_apart(self) -> None:
        """ "a b" is one token, which does not begin with that of "a": 1, then 2 and 3."""
        row, _ = question_rows(Question("a", ("b", "bb"), 0), merging_tokenizer(), "cloze")
        assert (row.ids, row.num_context) == ((1, 2, 3), 1)

    def test_bos_leads_and_survives_cutting(self) -> None:
        """7 tokens: 4 of them are " blu", which leaves 3 for the end of the context, or 2 after a bos."""
        row, _ = question_rows(Question("The sky is", ("blu", "gre"), 0), WITH_BOS, "cloze", max_length=7)
        assert row.ids[0] == 1 and TOKENIZER.decode(row.ids[1:]) == "is blu" and row.num_context == 3
        row, _ = question_rows(Question("The sky is", ("blu", "gre"), 0), TOKENIZER, "cloze", max_length=7)
        assert TOKENIZER.decode(row.ids) == " is blu" and row.num_context == 3

    def test_no_room_for_a_context(self) -> None:
        assert len(question_rows(SKY, WITH_BOS, "cloze", max_length=7)[1].ids) == 7  # bos and " green"
        for tokenizer, length in ((WITH_BOS, 6), (TOKENIZER, 6), (TOKENIZER, 3)):
            with pytest.raises(
                DataError, match=f"' green' of question 'The sky is' has 6 tokens.*1 to {length}|' blue'"
            ):
                question_rows(SKY, tokenizer, "cloze", max_length=length)

    def test_a_context_of_nothing_gets_the_end_of_text(self) -> None:
        tokenizer = merging_tokenizer()  # has no bos
        row, _ = question_rows(Question("z", ("a", "b"), 0), tokenizer, "cloze")  # "z" is no token of it
        assert row.ids == (0, 2, 1) and row.num_context == 1
        with pytest.raises(DataError, match="has 0 tokens"):
            question_rows(Question("a", ("a", ""), 0), byte_tokenizer_without_spaces(), "cloze")


def byte_tokenizer_without_spaces() -> Any:
    """Drops every space, so that " " + "" is nothing."""
    inner = byte_tokenizer()

    def call(text: str, *, add_special_tokens: bool) -> Any:
        return inner(text.replace(" ", ""), add_special_tokens=add_special_tokens)

    class Wrapped:
        eos_token_id, bos_token_id, pad_token_id = 0, None, None
        __call__ = staticmethod(call)

    return Wrapped()


class TestChoose:
    NAN, INF = math.nan, math.inf

    @pytest.mark.parametrize(
        ("scores", "chosen"),
        [
            ([-3.0, -1.0, -2.0], 1),
            ([-1.0, -1.0, -2.0], 0),
            ([-2.0, -1.0, -1.0], 1),
            ([-INF, -5.0, -INF], 1),
            ([NAN, -1.0, -2.0], -1),
            ([-1.0, NAN, -2.0], -1),
            ([-INF, -INF, -INF], -1),
        ],
    )
    def test_one_question(self, scores: list[float], chosen: int) -> None:
        assert evaluation.choose(torch.tensor(scores), 3).tolist() == [chosen]
        right = evaluation.accuracy(torch.tensor(scores), [max(chosen, 0)], 3)
        assert right == Statistic(sum=float(chosen >= 0), count=1)

    @given(st.lists(st.integers(2, 5), min_size=1, max_size=6), st.integers(0, 2**32))
    @settings(max_examples=60, deadline=None)
    def test_against_a_loop(self, counts: list[int], seed: int) -> None:
        """Questions of different numbers of choices; coarse scores, so that ties are frequent."""
        generator = random.Random(seed)
        scores = [[generator.choice([-3.0, -2.0, -1.0]) for _ in range(count)] for count in counts]
        answers = [generator.randrange(count) for count in counts]
        flat = torch.tensor([score for group in scores for score in group])
        naive = sum(group.index(max(group)) == answer for group, answer in zip(scores, answers, strict=True))
        assert evaluation.accuracy(flat, answers, counts) == Statistic(sum=naive, count=len(counts))
        if len(set(counts)) == 1:
            assert evaluation.accuracy(flat, answers, counts[0]).sum == naive


def forward(logits: Tensor, choices: Tensor) -> Forward:
    return Forward(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), {2: logits}, {2: choices})


class TestDrift:
    def test_by_hand(self) -> None:
        """Two tokens, 2 of 3 experts. The first keeps {0, 1}, the second has {0, 2} for {0, 1}: 1 + 1/2.

        Top-1 by logit: expert 0 then 1 for the first, 0 and 0 for the second: 1 of 2. Choices are unsorted.
        """
        before = forward(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([[1, 0], [0, 1]]))
        after = forward(torch.tensor([[2.0, 3.0, 1.0], [3.0, 1.0, 2.0]]), torch.tensor([[0, 1], [2, 0]]))
        drift = evaluation.drift(before, after, "softmax")
        assert drift["overlap_top1"] == {2: Statistic(sum=1, count=2)}
        assert drift["overlap_topk"] == {2: Statistic(sum=1.5, count=2)}
        p = [math.exp(z) / sum(map(math.exp, (3, 2, 1))) for z in (3, 2, 1)]
        expected = (p[0] - p[1]) * 1 + (
            p[1] - p[2]
        ) * 1  # sum of p (log p - log q): swapped logits differ by 1
        assert drift["kl"][2].sum == pytest.approx(expected, rel=1e-6) and drift["kl"][2].count == 2

    @pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
    def test_none_where_nothing_changed(self, scoring: Any) -> None:
        """The same logits, their choices in another order, and ties between them."""
        logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).round()
        choices = logits.topk(3).indices
        drift = evaluation.drift(forward(logits, choices), forward(logits, choices.flip(1)), scoring)
        assert drift["overlap_top1"][2] == drift["overlap_topk"][2] == Statistic(sum=50, count=50)
        assert drift["kl"][2] == Statistic(sum=0, count=50)

    def test_sigmoid_against_a_loop(self) -> None:
        logits, moved = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)).double()
        before, after = logits.topk(2).indices, moved.topk(2).indices
        expected = 0.0
        for z, y in zip(logits.tolist(), moved.tolist(), strict=True):
            p, q = ([1 / (1 + math.exp(-v)) for v in row] for row in (z, y))
            p, q = ([v / sum(row) for v in row] for row in (p, q))
            expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        drift = evaluation.drift(forward(logits, before), forward(moved, after), "sigmoid")
        assert drift["kl"][2].sum == pytest.approx(expected, rel=1e-5)

    def test_parts_merge_to_the_whole(self) -> None:
        logits, moved = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(2))
        merged: evaluation.Drift = {}
        for part in (slice(0, 4), slice(4, 9)):
            before = forward(logits[part], logits[part].topk(2).indices)
            after = forward(moved[part], moved[part].topk(2).indices)
            merged = evaluation.merge_drift(merged, evaluation.drift(before, after, "softmax"))
        whole = evaluation.drift(
            forward(logits, logits.topk(2).indices), forward(moved, moved.topk(2).indices), "softmax"
        )
        for name in whole:
            assert merged[name][2].sum == pytest.approx(whole[name][2].sum, abs=1e-6)
            assert merged[name][2].count == whole[name][2].count == 9


class TestStatistics:
    def test_nll(self) -> None:
        """-(-1 - 2.5) over the two counted tokens; what is not counted may be anything."""
        logps = torch.tensor([[-1.0, -2.5, math.nan], [-math.inf, 0.0, 0.0]])
        mask = torch.tensor([[True, True, False], [False, False, False]])
        assert evaluation.nll_statistic(logps, mask) == Statistic(sum=3.5, count=2)
        assert evaluation.nll_statistic(logps, torch.zeros_like(mask)) == Statistic(sum=0, count=0)
        assert math.isnan(evaluation.nll_statistic(logps, torch.ones_like(mask)).sum)

    def test_is_a_float64_sum(self) -> None:
        """A million times 0.1 in float32 drifts by whole nats; math.fsum is the golden value."""
        values = torch.full((1000, 1000), -0.1)
        found = evaluation.nll_statistic(values, torch.ones_like(values, dtype=torch.bool))
        assert found.sum == pytest.approx(math.fsum([float(torch.tensor(0.1))] * 1_000_000), abs=1e-6)

    @given(st.lists(st.floats(0, 1000), min_size=2, max_size=40), st.integers(0, 2**32))
    @settings(max_examples=60, deadline=None)
    def test_any_order_of_merging_gives_the_same_bits(self, values: list[float], seed: int) -> None:
        parts = [evaluation.statistic(torch.tensor([value], dtype=torch.float64)) for value in values]
        forwards = sum_up(parts)
        random.Random(seed).shuffle(parts)
        middle = len(parts) // 2
        assert evaluation.merge(sum_up(parts[middle:]), sum_up(parts[:middle])) == forwards
        assert forwards.sum == pytest.approx(math.fsum(values), abs=1e-7)


def sum_up(parts: list[Statistic]) -> Statistic:
    total = Statistic(sum=0, count=0)
    for part in parts:
        total = evaluation.merge(total, part)
    return total


def naive_subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + naive_subsequence(a[:-1], b[:-1])
    return max(naive_subsequence(a[:-1], b), naive_subsequence(a, b[:-1]))


class TestRouge:
    @pytest.mark.parametrize(
        ("prediction", "reference", "recall"),
        [
            ("Stephen King wrote it", "Stephen King", 1.0),
            ("King Stephen", "Stephen King", 0.5),
            ("nobody knows", "Stephen King", 0.0),
            ("", "Stephen King", 0.0),
            ("the horror novels", "a horror novel", 2 / 3),
        ],
    )
    def test_by_hand(self, prediction: str, reference: str, recall: float) -> None:
        """Words of the longest common subsequence, over those of the reference; "novels" stems to "novel"."""
        pytest.importorskip("rouge_score")
        assert evaluation.rouge_l_recall(prediction, reference) == pytest.approx(recall)

    @given(
        st.lists(st.sampled_from("xyz"), max_size=7), st.lists(st.sampled_from("xyz"), min_size=1, max_size=7)
    )
    @settings(max_examples=50, deadline=None)
    def test_against_a_recursion(self, prediction: list[str], reference: list[str]) -> None:
        pytest.importorskip("rouge_score")
        recall = naive_subsequence(prediction, reference) / len(reference)
        assert evaluation.rouge_l_recall(" ".join(prediction), " ".join(reference)) == pytest.approx(recall)

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
        evaluation._rouge_scorer.cache_clear()
        with pytest.raises(ConfigError, match=r"extra 'eval': pip install 'seuf-ray\[eval\]'"):
            evaluation.rouge_l_recall("x", "y")


def curve(*points: tuple[float, float]) -> list[CurvePoint]:
    return [CurvePoint(step=i, forget_accuracy=f, utility=u) for i, (f, u) in enumerate(points)]


class TestInterpolation:
    @pytest.mark.parametrize(
        ("points", "expected"),
        [
            ([], None),
            ([(0.9, 0.8), (0.5, 0.7)], None),
            ([(0.3, 0.8), (0.2, 0.7)], 0.8),
            ([(0.8, 0.9), (0.4, 0.7)], 0.7),
            ([(0.8, 0.9), (0.2, 0.6)], 0.7),  # 0.4 is 2/3 of the way from 0.8 to 0.2
            ([(0.8, 0.9), (0.6, 0.8), (0.2, 0.6), (0.9, 0.1), (0.1, 0.0)], 0.7),  # the first time only
            ([(0.8, 0.9), (math.nan, 0.8), (0.2, 0.6)], 0.7),
        ],
    )
    def test_by_hand(self, points: list[tuple[float, float]], expected: float | None) -> None:
        found = evaluation.interpolate_utility(curve(*points), 0.4)
        assert found == (None if expected is None else pytest.approx(expected))
        assert evaluation.interpolate_utility(curve(*points)[::-1], 0.4) == found  # steps order the curve

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 1))
    @settings(max_examples=100, deadline=None)
    def test_lies_between_its_neighbours(self, points: list[tuple[float, float]], level: float) -> None:
        found = evaluation.interpolate_utility(curve(*points), level)
        if all(forget > level for forget, _ in points):
            assert found is None
            return
        assert found is not None
        if points[0][0] > level:
            crossing = next((a, b) for a, b in pairwise(points) if b[0] <= level)
            low, high = sorted(utility for _, utility in crossing)
            assert low - 1e-9 <= found <= high + 1e-9
