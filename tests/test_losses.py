"""Losses against arithmetic done by hand, and against the formulas written out again as float64 loops.

The loops share no code with the package: they take logits, token rows and chosen experts, and nothing else. Router
logits hold real tokens only, one after the other, as `Forward` has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forwards import (
    EXPERTS,
    FORGET,
    LAYERS,
    RETAIN,
    TARGETS,
    TOP_K,
    VOCAB,
    assert_same,
    forward,
    gradients,
    naive_ce,
    normal,
    one_token,
    router_logits,
    sum_of,
    token_logits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seuf_ray import config, unlearning
from seuf_ray.algorithms.ga import GradientAscent
from seuf_ray.algorithms.gdiff import GradientDifference
from seuf_ray.anchors.frozen import FrozenRouter
from seuf_ray.anchors.kl import KLAnchor
from seuf_ray.anchors.none import NoAnchor
from seuf_ray.anchors.onehot import OneHotAnchor
from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Row
from seuf_ray.families import Scoring
from seuf_ray.passes import Forward, Targets, token_logps

GA, NONE = GradientAscent(), NoAnchor()


# --- the loops ---


def naive_distribution(logits: Tensor, scoring: Scoring) -> list[Tensor]:
    """softmax(z), or sigmoid(z) / sum."""
    weights = [z.exp() if scoring == "softmax" else 1 / (1 + (-z).exp()) for z in logits]
    return [weight / sum(weights) for weight in weights]


def naive_kl(
    reference: dict[int, Tensor], current: dict[int, Tensor], layers: Sequence[int], scoring: Scoring
) -> Tensor:
    """Mean over layers and tokens of sum_i p_i log(p_i / q_i)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for layer in layers:
        for before, after in zip(reference[layer], current[layer], strict=True):
            p, q = naive_distribution(before, scoring), naive_distribution(after, scoring)
            total = total + sum(p[i] * (p[i] / q[i]).log() for i in range(EXPERTS))
            count += 1
    return total / count


def naive_onehot(router: dict[int, Tensor], targets: Targets, anchor: OneHotAnchor) -> Tensor:
    """Mean over layers and tokens of sum_i (g_i - a_i)^2, SEUF's Eq. 3; or its variants."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for layer in targets.routers:
        for z in router[layer]:
            if targets.scoring == "softmax":
                score = naive_distribution(z, "softmax")
            else:
                score = [1 / (1 + (-value).exp()) for value in z]
            chosen = sorted(range(EXPERTS), key=lambda i: -z[i].item())[:TOP_K]
            for i in range(EXPERTS):
                value = score[i] if anchor.values == "scores" or i in chosen else torch.zeros(())
                wanted = 1.0 if (layer, i) in targets.experts else 0.0
                total = total + (value - wanted) ** 2 / (EXPERTS if anchor.reduction == "mean" else 1)
            count += 1
    return anchor.weight * total / count


# --- gradient ascent and difference ---


class TestGradientAscent:
    def test_every_token_weighs_the_same(self) -> None:
        """One row has one token of probability 3/4, the other two of 1/2. CE = (-ln 3/4 + 2 ln 2) / 3
        = (0.28768 + 1.38629) / 3 = 0.55799. The mean of the rows' means would be (0.28768 + 0.69315) / 2 = 0.49042.
        """
        loss = GA.loss(one_token((0.75, 1), (0.5, 2)))
        assert list(loss) == ["forget"]
        assert loss["forget"].item() == pytest.approx(-0.55799, abs=1e-5)

    def test_value_and_gradient_are_the_formulas(self) -> None:
        logits = token_logits(FORGET, seed=1)
        assert_same(GA.loss(forward(FORGET, logits))["forget"], -naive_ce(logits, FORGET), [logits])

    def test_the_gradient_is_softmax_minus_one_hot_upside_down(self) -> None:
        """d(-CE)/dz_v = ([v = y] - p_v) / 9 at the positions before counted tokens (rows of 5, 3 and 7 tokens with
        contexts of 1, 2 and 3: 4 + 1 + 4 = 9), and 0 at contexts and padding.
        """
        logits = token_logits(FORGET, seed=2)
        (found,) = gradients(GA.loss(forward(FORGET, logits))["forget"], [logits])
        expected = torch.zeros_like(logits)
        for b, row in enumerate(FORGET):
            for t in range(row.num_context, len(row.ids)):
                expected[b, t - 1] = -logits[b, t - 1].detach().softmax(0) / 9
                expected[b, t - 1, row.ids[t]] += 1 / 9
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)

    def test_padding_and_contexts_never_count(self) -> None:
        """Whatever the logits there are, and whatever token the padding is."""
        logits = token_logits(FORGET, seed=3).detach()
        before = GA.loss(forward(FORGET, logits))["forget"]
        changed = logits.clone()
        for b, row in enumerate(FORGET):
            changed[b, : row.num_context - 1] = 50.0
            changed[b, len(row.ids) - 1 :] = torch.arange(VOCAB).double()
        assert torch.equal(GA.loss(forward(FORGET, changed))["forget"], before)


class TestGradientDifference:
    def test_by_hand(self) -> None:
        """-CE(forget) = ln 1/2 = -0.69315; retain_weight * CE(retain) = 3 * -ln 3/4 = 0.86305."""
        loss = GradientDifference(retain_weight=3).loss(one_token((0.5, 2)), one_token((0.75, 1)))
        assert {name: round(term.item(), 5) for name, term in loss.items()} == {
            "forget": -0.69315,
            "retain": 0.86305,
        }

    def test_value_and_gradient_are_the_formulas(self) -> None:
        forget, retain = token_logits(FORGET, seed=4), token_logits(RETAIN, seed=5)
        terms = GradientDifference(retain_weight=0.3).loss(forward(FORGET, forget), forward(RETAIN, retain))
        expected = -naive_ce(forget, FORGET) + 0.3 * naive_ce(retain, RETAIN)
        assert_same(terms["forget"] + terms["retain"], expected, [forget, retain])

    def test_without_a_retain_weight_it_is_gradient_ascent(self) -> None:
        leaves = [token_logits(FORGET, seed=6), token_logits(RETAIN, seed=7)]
        f, r = forward(FORGET, leaves[0]), forward(RETAIN, leaves[1])
        ours, ascent = sum_of(GradientDifference(retain_weight=0).loss(f, r)), sum_of(GA.loss(f))
        assert torch.equal(ours, ascent)
        for mine, other in zip(gradients(ours, leaves), gradients(ascent, leaves), strict=True):
            assert torch.equal(mine, other)

    def test_the_default_weight_is_one(self) -> None:
        assert GradientDifference().retain_weight == 1.0


# --- anchors ---


def routed(*tables: list[list[float]], layers: Sequence[int] = (0,)) -> Forward:
    """A pass of which only the routing matters: a table of probabilities (N, E) per layer."""
    logits = {layer: torch.tensor(table).log() for layer, table in zip(layers, tables, strict=True)}
    choices = {layer: z.topk(2, dim=-1).indices for layer, z in logits.items()}
    empty = torch.zeros(1, 0)
    return Forward(empty, empty.bool(), logits, choices, num_routed=float(len(tables[0])))


def targets_at(*experts: tuple[int, int], scoring: Scoring = "softmax", moe_layers: int = 3) -> Targets:
    layers = sorted({layer for layer, _ in experts})
    return Targets(tuple(experts), tuple(layers), tuple(range(moe_layers)), scoring)


class TestKL:
    def test_by_hand(self) -> None:
        """KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 ln 2/3 + 1/2 ln 2 = 1/2 ln 4/3 = 0.14384; the second token's is 0, so
        the mean is 0.07192. The other way round it would be 3/4 ln 3/2 + 1/4 ln 1/2 = 0.13081.
        """
        before, after = routed([[0.5, 0.5], [0.9, 0.1]]), routed([[0.75, 0.25], [0.9, 0.1]])
        loss = KLAnchor().loss(targets_at((0, 1)), after, before)
        assert list(loss) == ["anchor"]
        assert loss["anchor"].item() == pytest.approx(0.14384 / 2, abs=1e-5)
        assert KLAnchor(weight=10).loss(targets_at((0, 1)), after, before)["anchor"].item() == pytest.approx(
            0.7192, abs=1e-4
        )

    def test_sigmoid_routers_have_the_distribution_sigmoid_over_sum(self) -> None:
        """sigmoid(0) = 1/2 and sigmoid(ln 3) = 3/4, so p = (2/5, 3/5); q = (1/2, 1/2) at equal logits.
        KL = 2/5 ln 4/5 + 3/5 ln 6/5 = 0.02014; softmax would give p = (1/4, 3/4) and 0.13081.
        """
        before, after = routed([[1.0, 3.0]]), routed([[1.0, 1.0]])
        loss = KLAnchor().loss(targets_at((0, 1), scoring="sigmoid"), after, before)
        assert loss["anchor"].item() == pytest.approx(0.02014, abs=1e-5)

    @pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
    @pytest.mark.parametrize(("layers", "anchored"), [("targets", (1, 4)), ("all", (1, 3, 4))])
    def test_value_and_gradient_are_the_formulas(
        self, scoring: Scoring, layers: Any, anchored: tuple[int, ...]
    ) -> None:
        """Targets in layers 1 and 4: `all` adds layer 3, and never layer 0, which lies below."""
        targets = Targets(TARGETS.experts, TARGETS.routers, TARGETS.moe_layers, scoring)
        before, after = router_logits(FORGET, seed=1), router_logits(FORGET, seed=2)
        logits = token_logits(FORGET, seed=8)
        passes = forward(FORGET, logits, after), forward(FORGET, logits, before)
        loss = KLAnchor(weight=0.7, layers=layers).loss(targets, *passes)["anchor"]
        expected = 0.7 * naive_kl(before, after, anchored, scoring)
        assert_same(loss, expected, list(after.values()))

    @pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
    def test_value_and_gradient_are_zero_at_the_reference(self, scoring: Scoring) -> None:
        targets = Targets(TARGETS.experts, TARGETS.routers, TARGETS.moe_layers, scoring)
        router = router_logits(FORGET, seed=3)
        reference = {layer: z.detach().clone() for layer, z in router.items()}
        logits = token_logits(FORGET, seed=9)
        passes = forward(FORGET, logits, router), forward(FORGET, logits, reference)
        loss = KLAnchor(layers="all").loss(targets, *passes)["anchor"]
        assert loss.item() == 0.0
        for gradient in gradients(loss, list(router.values())):
            assert gradient.abs().max() < 1e-7

    def test_very_negative_sigmoid_logits_are_a_distribution_too(self) -> None:
        """Four equal logits are (1/4, 1/4, 1/4, 1/4) however low they are: KL 0, and KL to one expert ln 4. Summing
        e^-5000 first would lose the ln 4 that the sum adds to the largest.
        """
        targets = targets_at((0, 1), scoring="sigmoid")
        for level in (-5e3, -1e8, -1e30):
            low, flat = routed([[1.0] * 4]), routed([[1.0] * 4])
            low.router_logits[0].fill_(level)
            assert KLAnchor().loss(targets, low, flat)["anchor"].item() == pytest.approx(0.0, abs=1e-6)
        one = routed([[1.0] * 4])
        one.router_logits[0][:] = torch.tensor([0.0, -1e30, -1e30, -1e30])
        assert KLAnchor().loss(targets, low, one)["anchor"].item() == pytest.approx(math.log(4))

    def test_its_gradient_is_current_minus_original(self) -> None:
        """d KL(p || softmax(z)) / dz = q - p, here (3/4, 1/4) - (1/2, 1/2)."""
        z = torch.tensor([[0.75, 0.25]]).log().requires_grad_()
        after = Forward(
            torch.zeros(1, 0),
            torch.zeros(1, 0, dtype=torch.bool),
            {0: z},
            {0: torch.tensor([[0]])},
            num_routed=1,
        )
        loss = KLAnchor().loss(targets_at((0, 1)), after, routed([[0.5, 0.5]]))["anchor"]
        torch.testing.assert_close(gradients(loss, [z])[0], torch.tensor([[0.25, -0.25]]))


class TestOneHot:
    def test_by_hand(self) -> None:
        """Scores (1/2, 1/4, 1/8, 1/8), so gates (1/2, 1/4, 0, 0); target 1: a = (0, 1, 0, 0).
        Gates: 1/4 + 9/16 = 0.8125. Scores: 2/64 more = 0.84375. The mean over 4 experts is a quarter of each.
        """
        forget, targets = routed([[0.5, 0.25, 0.125, 0.125]]), targets_at((0, 1))
        found = {
            (values, reduction): OneHotAnchor(values=values, reduction=reduction)
            .loss(targets, forget)["anchor"]
            .item()
            for values in ("gates", "scores")
            for reduction in ("sum", "mean")
        }
        assert found == pytest.approx(
            {
                ("gates", "sum"): 0.8125,
                ("gates", "mean"): 0.203125,
                ("scores", "sum"): 0.84375,
                ("scores", "mean"): 0.2109375,
            }
        )

    def test_two_targets_in_a_layer_are_both_wanted(self) -> None:
        """a = (1, 1, 0, 0): 1/4 + 9/16 = 0.8125 again, but of the other sign at expert 0."""
        z = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().requires_grad_()
        forget = Forward(
            torch.zeros(1, 0),
            torch.zeros(1, 0, dtype=torch.bool),
            {0: z},
            {0: z.topk(2).indices},
            num_routed=1,
        )
        loss = OneHotAnchor().loss(targets_at((0, 0), (0, 1)), forget)["anchor"]
        assert loss.item() == pytest.approx(0.8125)
        assert gradients(loss, [z])[0][0, 0] < 0  # a descent step raises expert 0's logit

    @pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("values", ["gates", "scores"])
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_value_and_gradient_are_the_formulas(self, scoring: Scoring, values: Any, reduction: Any) -> None:
        targets = Targets(TARGETS.experts, TARGETS.routers, TARGETS.moe_layers, scoring)
        anchor = OneHotAnchor(weight=1.3, values=values, reduction=reduction)
        router = router_logits(FORGET, seed=4)
        passed = forward(FORGET, token_logits(FORGET, seed=10), router)
        assert_same(
            anchor.loss(targets, passed)["anchor"],
            naive_onehot(router, targets, anchor),
            list(router.values()),
        )

    @pytest.mark.parametrize("values", ["gates", "scores"])
    def test_sum_is_the_number_of_experts_times_mean(self, values: Any) -> None:
        passed = forward(FORGET, token_logits(FORGET, seed=11), router_logits(FORGET, seed=5))
        whole = OneHotAnchor(values=values, reduction="sum").loss(TARGETS, passed)["anchor"]
        mean = OneHotAnchor(values=values, reduction="mean").loss(TARGETS, passed)["anchor"]
        torch.testing.assert_close(whole, EXPERTS * mean)


@pytest.mark.parametrize("anchor", [FrozenRouter(), NoAnchor()])
def test_frozen_and_none_have_no_loss_and_ask_for_no_pass(anchor: Any) -> None:
    assert anchor.loss() == {}
    assert unlearning.passes_of(anchor) == set()


@pytest.mark.parametrize("kind", [KLAnchor, OneHotAnchor])
def test_the_routers_gradient_grows_with_the_anchors_weight(kind: Any) -> None:
    """gradient(w) = ascent's + w * anchor's, of the router's own weight W with logits x W^T. The token logits are
    made of the scores, so that the forget term reaches W too.
    """
    x, weight = normal(8, 5, seed=20).detach(), normal(EXPERTS, 5, seed=21)
    original = normal(EXPERTS, 5, seed=22).detach()
    head = normal(EXPERTS, VOCAB, seed=23).detach()
    rows, targets = [Row((1, 2, 3, 4)), Row((5, 6, 1, 2))], targets_at((0, 1), moe_layers=1)

    def gradient(alpha: float) -> Tensor:
        z = x @ weight.T
        logits = (z.softmax(-1) @ head).view(2, 4, VOCAB)
        known = {
            "forget": forward(rows, logits, {0: z}),
            "forget_ref": forward(rows, logits, {0: x @ original.T}),
            "targets": targets,
        }
        terms = unlearning._call(GA, known) | unlearning._call(kind(weight=alpha), known)
        return gradients(sum_of(terms), [weight])[0]

    none, one, two = gradient(0), gradient(1), gradient(2)
    assert none.abs().max() > 1e-3 and (one - none).abs().max() > 1e-3
    torch.testing.assert_close(two - one, one - none, rtol=1e-4, atol=1e-6)


# --- several ranks ---


class TestRanks:
    """A batch of four rows of 2 to 9 tokens, on two ranks: three rows on one, one on the other (or none)."""

    rows: Sequence[Row] = (
        Row((1, 2)),
        Row((3, 4, 5, 6, 1, 2, 3, 4, 5), num_context=4),
        Row((6, 5, 4)),
        Row((1, 3, 5, 2)),
    )
    num_ranks = 2

    def losses(self, weights: dict[str, Tensor], mine: Sequence[int], ranks: int) -> Tensor:
        """The rank's loss of the rows `mine`; `ranks` says over how many the global counts are spread."""
        whole = collate(self.rows, pad_id=0)
        counts = {
            "num_tokens": float(whole.counted.sum()) / ranks,
            "num_sequences": len(self.rows) / ranks,
            "num_routed": float(whole.attention.sum()) / ranks,
        }
        inputs = normal(len(self.rows), whole.ids.shape[1], 5, seed=30).detach()
        rows = [self.rows[i] for i in mine]
        longest = max(len(row.ids) for row in rows)
        states = inputs[list(mine), :longest] @ weights["body"]  # (B, T, 5)
        real = torch.cat([states[b, : len(row.ids)] for b, row in enumerate(rows)])  # (N, 5)
        before = torch.cat([inputs[i, : len(self.rows[i].ids)] for i in mine])
        router = {layer: real @ weights["router"] + layer for layer in LAYERS}
        original = {layer: before @ weights["router"].detach() - layer * before[:, :1] for layer in LAYERS}
        known = {
            "forget": forward(rows, states @ weights["head"], router, **counts),
            "forget_ref": forward(rows, states @ weights["head"], original, **counts),
            "retain": forward(rows, states @ weights["head"] * 0.5, **counts),
            "targets": TARGETS,
        }
        plugins = (GradientDifference(retain_weight=0.3), KLAnchor(weight=0.7, layers="all"), OneHotAnchor())
        return torch.stack([sum_of(unlearning._call(plugin, known)) for plugin in plugins]).sum()

    @pytest.mark.parametrize("split", [([0, 1, 2], [3]), ([1], [0, 2, 3]), ([0, 2], [1, 3])])
    def test_averaged_gradients_are_the_whole_batchs(self, split: tuple[list[int], list[int]]) -> None:
        """sum over ranks of (local sum / (global count / R)) / R = global sum / global count, however uneven."""
        weights = {
            "body": normal(5, 5, seed=31),
            "router": normal(5, EXPERTS, seed=32),
            "head": normal(5, VOCAB, seed=33),
        }
        leaves = list(weights.values())
        whole = self.losses(weights, range(4), ranks=1)
        parts = [self.losses(weights, mine, ranks=2) for mine in split]
        torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-6, atol=1e-6)
        averaged = [(a + b) / 2 for a, b in zip(*(gradients(part, leaves) for part in parts), strict=True)]
        for ours, expected in zip(averaged, gradients(whole, leaves), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)

    def test_means_of_float64_agree_to_its_last_digits(self) -> None:
        """Nothing but the order of additions differs: with 3 and 17 tokens, each divided by 20 / 2 = 10."""
        values, logps = normal(20, seed=34).detach(), normal(1, 20, seed=35).detach()
        halves = []
        for part in (slice(0, 3), slice(3, 20)):
            rank = Forward(
                logps[:, part],
                torch.ones(1, 20, dtype=torch.bool)[:, part],
                num_tokens=10,
                num_sequences=10,
                num_routed=10,
            )
            halves.append([rank.nll(), rank.mean_sequences(values[part]), rank.mean_routed(values[part])])
        whole = Forward(logps, torch.ones(1, 20, dtype=torch.bool), num_sequences=20, num_routed=20)
        means = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
        expected = [-logps.mean(), whole.mean_sequences(values), whole.mean_routed(values)]
        torch.testing.assert_close(torch.stack(means), torch.stack(expected), rtol=1e-15, atol=1e-15)

    def test_a_filler_adds_nothing_to_value_or_gradient(self) -> None:
        """A rank without rows runs a filler: no counted token and no routed one, but every term has a gradient: 0."""
        rows = collate(list(self.rows), pad_id=0).filler()
        logits = token_logits(self.rows, seed=36)
        router = {layer: normal(0, EXPERTS, seed=37) for layer in LAYERS}
        choices = {layer: torch.zeros(0, TOP_K, dtype=torch.int64) for layer in LAYERS}
        filler = Forward(
            token_logps(logits, rows.ids),
            rows.counted[:, 1:],
            router,
            choices,
            num_tokens=5.0,
            num_sequences=2.0,
            num_routed=9.0,
        )
        known = {"forget": filler, "forget_ref": filler, "retain": filler, "targets": TARGETS}
        for plugin in (GA, GradientDifference(), KLAnchor(), OneHotAnchor()):
            loss = sum_of(unlearning._call(plugin, known))
            assert loss.item() == 0.0
            for gradient in gradients(loss, [logits, *router.values()]):
                assert (gradient == 0).all()


# --- for any input ---

LARGE = 1e36  # a KL is up to 2e36 per token then; twice float32's largest number could not be said in float32
ANY = st.floats(-LARGE, LARGE) | st.floats(-30, 30)


@st.composite
def tables(draw: st.DrawFn, rows: int, columns: int) -> Tensor:
    values = draw(st.lists(ANY, min_size=rows * columns, max_size=rows * columns))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return torch.tensor(values).view(rows, columns).to(dtype).requires_grad_()


@given(tables(4, VOCAB), tables(4, EXPERTS), tables(4, EXPERTS), st.sampled_from(["softmax", "sigmoid"]))
@settings(max_examples=120, deadline=None)
def test_losses_are_finite_for_finite_logits(
    logits: Tensor, router: Tensor, original: Tensor, scoring: Scoring
) -> None:
    """Values and gradients, in the range of float32 and bfloat16; a KL is never negative (but for rounding)."""
    rows, targets = [Row((1, 2, 3, 4))], targets_at((1, 2), scoring=scoring, moe_layers=2)
    passed = forward(rows, logits[None], {1: router})
    reference = forward(rows, logits[None].detach(), {1: original.detach()})
    known = {"forget": passed, "forget_ref": reference, "retain": passed, "targets": targets}
    for plugin in (GA, GradientDifference(), KLAnchor(), OneHotAnchor(), OneHotAnchor(values="scores")):
        terms = unlearning._call(plugin, known)
        assert all(torch.isfinite(term) for term in terms.values()), terms
        for gradient in gradients(sum_of(terms), [logits, router]):
            assert torch.isfinite(gradient).all()
        if isinstance(plugin, KLAnchor):
            assert terms["anchor"] > -1e-6


@given(st.permutations(range(len(FORGET))), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_the_order_of_sequences_does_not_matter(order: list[int], seed: int) -> None:
    logits, router, original = (
        token_logits(FORGET, seed),
        router_logits(FORGET, seed),
        router_logits(FORGET, seed + 99),
    )
    starts = [sum(len(row.ids) for row in FORGET[:i]) for i in range(len(FORGET))]
    tokens = [starts[i] + t for i in order for t in range(len(FORGET[i].ids))]
    plain = {
        "forget": forward(FORGET, logits, router),
        "forget_ref": forward(FORGET, logits, original),
        "retain": forward(FORGET, logits),
        "targets": TARGETS,
    }
    rows = [FORGET[i] for i in order]
    shuffled = {
        "forget": forward(rows, logits[order], {at: z[tokens] for at, z in router.items()}),
        "forget_ref": forward(rows, logits[order], {at: z[tokens] for at, z in original.items()}),
        "retain": forward(rows, logits[order]),
        "targets": TARGETS,
    }
    leaves = [logits, *router.values()]
    for plugin in (GA, GradientDifference(), KLAnchor(layers="all"), OneHotAnchor()):
        ours, theirs = (sum_of(unlearning._call(plugin, known)) for known in (shuffled, plain))
        assert_same(ours, theirs, leaves)


# --- seams ---


def test_a_loss_outside_the_package_asks_for_its_passes_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean lift over the original, on the forget set: needs `forget` and `forget_ref`, gets nothing else."""
    (tmp_path / "their_lab").mkdir()
    (tmp_path / "their_lab" / "lift.py").write_text(
        "from seuf_ray.plugins import Plugin\n\n"
        "class Lift(Plugin):\n"
        "    strength: float = 1.0\n\n"
        "    def loss(self, forget, forget_ref):\n"
        "        lift = forget.sequence_logps() - forget_ref.sequence_logps()\n"
        "        return {'lift': self.strength * forget.mean_sequences(lift)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    job = config.validate({"output_dir": "x", "algorithm": {"name": "their_lab.lift", "strength": 2}})
    assert unlearning.passes_of(job.algorithm) == {"forget", "forget_ref"}
    assert unlearning.passes_of(KLAnchor()) == {"forget", "forget_ref"}
    assert unlearning.passes_of(GradientDifference()) == {"forget", "retain", "retain_ref"}
    known = {
        "forget": one_token((0.5, 2), (0.75, 1)),
        "forget_ref": one_token((0.25, 2), (0.75, 1)),
        "targets": TARGETS,
    }
    terms = unlearning._call(job.algorithm, known)
    # 2 * (2 ln(1/2) - 2 ln(1/4) + 0) / 2 sequences = 2 ln 2
    assert terms["lift"].item() == pytest.approx(2 * math.log(2), rel=1e-6)
    with pytest.raises(config.ConfigError, match="algorithm.strenght: unknown key; did you mean 'strength'"):
        config.validate({"output_dir": "x", "algorithm": {"name": "their_lab.lift", "strenght": 2}})
