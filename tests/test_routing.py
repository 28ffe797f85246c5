"""Routing maths against loops over tokens and experts, and the exactness of fixed-point statistics."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny
from torch import Tensor

from seuf_ray import routing
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Row
from seuf_ray.families import Scoring
from seuf_ray.model.moe import MoEModel
from seuf_ray.passes import Forward, Targets

SCORINGS: tuple[Scoring, ...] = ("softmax", "sigmoid")
N, E, K = 9, 8, 3


def logits(seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(N, E, generator=torch.Generator().manual_seed(seed))


def choices(seed: int = 0) -> Tensor:
    """Not the best ones: group limits and biases may choose others."""
    generator = random.Random(seed)
    return torch.tensor([generator.sample(range(E), K) for _ in range(N)])


def naive_scores(z: list[float], scoring: Scoring) -> list[float]:
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in z]
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def table(values: Tensor, row: Callable[[list[float]], list[float]]) -> Tensor:
    """`row` of every row, in float64."""
    return torch.tensor([row(line) for line in values.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_scores_are_softmax_or_sigmoid(scoring: Scoring) -> None:
    found = routing.scores(logits(), scoring)
    torch.testing.assert_close(
        found.double(), table(logits(), lambda z: naive_scores(z, scoring)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_distribution_is_the_scores_over_their_sum(scoring: Scoring) -> None:
    def shares(z: list[float]) -> list[float]:
        scores = naive_scores(z, scoring)
        return [math.log(score / sum(scores)) for score in scores]

    found = routing.log_distribution(logits(), scoring)
    torch.testing.assert_close(found.double(), table(logits(), shares), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(N))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_float32(scoring: Scoring, dtype: torch.dtype) -> None:
    low = logits().to(dtype)
    assert routing.scores(low, scoring).dtype == torch.float32
    assert torch.equal(routing.scores(low, scoring), routing.scores(low.float(), scoring))
    assert torch.equal(routing.log_distribution(low, scoring), routing.log_distribution(low.float(), scoring))


def test_gates_are_the_scores_of_the_chosen_and_zero_elsewhere() -> None:
    """Not renormalised: the gates of a token add up to less than 1."""
    score = routing.scores(logits(), "softmax")
    found = routing.gates(score, choices())
    for token in range(N):
        for expert in range(E):
            expected = score[token, expert].item() if expert in choices()[token].tolist() else 0.0
            assert found[token, expert].item() == expected
    assert (found.sum(dim=1) < 1).all()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_kl_is_the_sum_over_experts(scoring: Scoring) -> None:
    before, after = logits(1), logits(2)
    found = routing.kl(before, after, scoring)
    for token in range(N):
        p, q = (naive_scores(z[token].tolist(), scoring) for z in (before, after))
        terms = [a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True)]
        assert found[token].item() == pytest.approx(sum(terms), rel=1e-5, abs=1e-6)
    assert (routing.kl(before, before, scoring) == 0).all()


def test_kl_does_not_see_a_shift_of_softmax_logits() -> None:
    """softmax(z + c) = softmax(z), while sigmoid routers do change."""
    shifted = logits() + 2.0
    assert routing.kl(logits(), shifted, "softmax").abs().max() < 1e-6
    assert routing.kl(logits(), shifted, "sigmoid").max() > 1e-3


def test_overlap_is_the_share_still_chosen_whatever_the_order() -> None:
    """{1, 2, 3} against {3, 1, 2}: 3/3; against {3, 4, 5}: 1/3; against {0, 4, 5}: 0."""
    before = torch.tensor([[1, 2, 3]] * 3)
    after = torch.tensor([[3, 1, 2], [3, 4, 5], [0, 4, 5]])
    assert routing.overlap(before, after).tolist() == pytest.approx([1, 1 / 3, 0])
    for token in range(N):
        a, b = choices(3)[token], choices(4)[token]
        expected = len(set(a.tolist()) & set(b.tolist())) / K
        assert routing.overlap(a, b).item() == pytest.approx(expected)


def test_sequence_means_are_over_each_sequences_own_tokens() -> None:
    """Lengths 1, 3 and 5 of 9 tokens."""
    values = logits(5)
    found = routing.sequence_means(values, [1, 3, 5])
    for row, (first, end) in enumerate([(0, 1), (1, 4), (4, 9)]):
        for expert in range(E):
            column = [values[t, expert].item() for t in range(first, end)]
            assert found[row, expert].item() == pytest.approx(sum(column) / len(column), rel=1e-12)


class TestFixedPoint:
    def test_by_hand(self) -> None:
        """1/3 * 2^32 = 1431655765.33 and 2/3 * 2^32 = 2863311530.67, rounded to the nearest."""
        found = routing.to_fixed(torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=torch.float64))
        assert found.tolist() == [0, 1431655765, 2863311531, 2**32]

    def test_an_int64_holds_two_thousand_million_tokens(self) -> None:
        assert 2_000_000_000 * routing.FIXED_POINT < 2**63

    @given(
        st.lists(st.floats(0, 1), min_size=1, max_size=40),
        st.randoms(use_true_random=False),
        st.integers(1, 7),
    )
    @settings(deadline=None)
    def test_any_order_and_grouping_gives_the_same_bits(
        self, values: list[float], shuffle: random.Random, size: int
    ) -> None:
        """Where float64 sums differ; the error is at most half a unit per value."""
        exact = sum(int(v) for v in routing.to_fixed(torch.tensor(values, dtype=torch.float64)))
        mixed = shuffle.sample(values, len(values))
        groups = [mixed[i : i + size] for i in range(0, len(mixed), size)]
        sums = [routing.to_fixed(torch.tensor(group, dtype=torch.float64)).sum() for group in groups]
        assert int(torch.stack(sums).sum()) == exact
        assert exact / routing.FIXED_POINT == pytest.approx(
            math.fsum(values), abs=len(values) * 2.0**-33 + 1e-12
        )

    def test_float64_sums_of_the_same_numbers_do_differ(self) -> None:
        """The reason for fixed point."""
        values = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
        orders = [random.Random(seed).sample(values, len(values)) for seed in range(20)]
        assert len({sum(order) for order in orders}) > 1
        fixed = [int(routing.to_fixed(torch.tensor(order, dtype=torch.float64)).sum()) for order in orders]
        assert len(set(fixed)) == 1


class TestPadding:
    """Padding is routed like any token, and must never count."""

    rows = (Row((3, 1, 4, 1, 5)), Row((2, 6)), Row((5, 3, 5, 8)))

    def test_routing_of_a_padded_batch_holds_its_real_tokens_only(self, tmp_path: Path) -> None:
        """5 + 2 + 4 = 11 of 3 x 9; the padding's token and its number change nothing."""
        model = MoEModel(Checkpoint(save_tiny(tmp_path / "model", "qwen2_moe")))
        with torch.no_grad():
            plain = model.forward(collate(self.rows, pad_id=0))
            padded = model.forward(collate(self.rows, pad_id=7, length=9))
        for layer in (0, 1, 2):
            assert plain.router_logits[layer].shape == (11, 8)
            torch.testing.assert_close(
                padded.router_logits[layer], plain.router_logits[layer], rtol=1e-4, atol=1e-5
            )
            assert torch.equal(padded.router_choices[layer], plain.router_choices[layer])
        assert (plain.num_tokens, plain.num_sequences, plain.num_routed) == (8, 3, 11)
        assert (padded.num_tokens, padded.num_sequences, padded.num_routed) == (8, 3, 11)

    def test_a_filler_counts_no_token(self) -> None:
        batch = collate(self.rows, pad_id=0).filler()
        assert not batch.counted.any() and not batch.routed.any()
        assert batch.attention.sum() == 11  # it is still read: a row without any token makes NaN

    def test_a_masked_token_adds_nothing_even_if_its_log_probability_is_infinite(self) -> None:
        logps = torch.tensor([[-1.0, -math.inf], [-3.0, math.nan]])
        mask = torch.tensor([[True, False], [True, False]])
        passed = Forward(logps, mask, num_tokens=2, num_sequences=2)
        assert passed.nll().item() == 2.0
        assert passed.sequence_logps().tolist() == [-1.0, -3.0]


def test_layers_below_the_first_target_are_not_anchored() -> None:
    targets = Targets(((2, 5), (4, 0), (2, 1)), routers=(2, 4), moe_layers=(1, 2, 3, 4, 5), scoring="softmax")
    assert targets.layers_from_first == (2, 3, 4, 5)
    assert targets.experts_of(2) == [5, 1] and targets.experts_of(3) == []
