"""Every algorithm against arithmetic done by hand, and against its paper's formula written out as float64 loops.

The loops share no code with the package: they take logits, hidden states and token rows, and nothing else. Gradient
ascent and difference are in `test_losses.py`, with the anchors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from forwards import (
    FORGET,
    RETAIN,
    TARGETS,
    VOCAB,
    assert_same,
    forward,
    gradients,
    naive_ce,
    normal,
    one_token,
    sum_of,
    token_logits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seuf_ray import unlearning
from seuf_ray.algorithms.dpo import DirectPreference
from seuf_ray.algorithms.ga import GradientAscent
from seuf_ray.algorithms.gdiff import GradientDifference
from seuf_ray.algorithms.npo import NegativePreference
from seuf_ray.algorithms.rmu import RepresentationMisdirection as RMU
from seuf_ray.algorithms.simnpo import SimpleNegativePreference
from seuf_ray.algorithms.undial import SelfDistillation
from seuf_ray.algorithms.wga import WeightedGradientAscent
from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Row
from seuf_ray.errors import ConfigError
from seuf_ray.passes import Targets
from seuf_ray.plugins import Plugin, Reads

IDK = [Row((3, 1, 6, 6)), Row((2, 6, 6, 6), num_context=2), Row((0, 3, 5, 6), num_context=3)]
ROWS = {"forget": FORGET, "idk": IDK, "retain": RETAIN}
LAYER, SIZE, SEED = 4, 5, 3  # the last target layer of TARGETS
Logits = dict[str, Tensor]


# --- the loops ---


def sums(logits: Tensor, rows: Sequence[Row]) -> list[Tensor]:
    """log p of each row's counted tokens."""
    found = []
    for b, row in enumerate(rows):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(row.num_context, len(row.ids)):
            total = total + (logits[b, t - 1, row.ids[t]].exp() / logits[b, t - 1].exp().sum()).log()
        found.append(total)
    return found


def ratios(z: Logits, name: str) -> list[Tensor]:
    return [a - b for a, b in zip(sums(z[name], ROWS[name]), sums(z[f"{name}_ref"], ROWS[name]), strict=True)]


def mean(values: Sequence[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64)) / len(values)


def npo(z: Logits, beta: float) -> Tensor:
    """2404.05868, Eq. 3: (2 / beta) E log(1 + (pi / pi_ref)^beta)."""
    return 2 / beta * mean([(1 + ratio.exp() ** beta).log() for ratio in ratios(z, "forget")])


def simnpo(z: Logits, beta: float, gamma: float) -> Tensor:
    """2410.07163, Eq. 4: -(2 / beta) E log sigmoid(-(beta / |y|) log pi - gamma)."""
    losses = []
    for row, total in zip(FORGET, sums(z["forget"], FORGET), strict=True):
        argument = -beta / (len(row.ids) - row.num_context) * total - gamma
        losses.append(-2 / beta * (1 / (1 + (-argument).exp())).log())
    return mean(losses)


def dpo(z: Logits, beta: float) -> Tensor:
    """2305.18290, Eq. 7, times 2 / beta."""
    pairs = zip(ratios(z, "idk"), ratios(z, "forget"), strict=True)
    return 2 / beta * mean([(1 + (beta * (lost - won)).exp()).log() for won, lost in pairs])


def wga(z: Logits, beta: float) -> Tensor:
    """2502.19301: E p^beta log p over tokens, the weight a number."""
    terms = []
    for b, row in enumerate(FORGET):
        for t in range(row.num_context, len(row.ids)):
            logits = z["forget"][b, t - 1]
            p = logits[row.ids[t]].exp() / sum(value.exp() for value in logits)
            terms.append(p.item() ** beta * p.log())
    return mean(terms)


def undial(z: Logits, beta: float) -> Tensor:
    """2402.10052: cross entropy to the original's softmax with the memorised token's logit lowered by beta."""
    terms = []
    for b, row in enumerate(FORGET):
        for t in range(row.num_context, len(row.ids)):
            weights = [value.exp() for value in z["forget_ref"][b, t - 1]]
            weights[row.ids[t]] = weights[row.ids[t]] * math.exp(-beta)
            student = z["forget"][b, t - 1]
            total = sum(value.exp() for value in student)
            taught = [weight / sum(weights) for weight in weights]
            terms.append(-sum(taught[v] * (student[v].exp() / total).log() for v in range(VOCAB)))
    return mean(terms)


def distances(h: Logits, name: str, wanted: Callable[[int, int], Tensor]) -> Tensor:
    """Mean over real tokens of the squared distance."""
    terms = []
    for b, row in enumerate(ROWS[name]):
        for t in range(len(row.ids)):
            terms.append(sum((h[name][b, t, d] - wanted(b, t)[d]) ** 2 for d in range(SIZE)))
    return mean(terms)


def rmu(h: Logits, c: float, weight: float) -> Tensor:
    """2403.03218, with the vector of the WMDP code: uniform entries, brought to length 1, times c."""
    uniform = torch.rand(SIZE, generator=torch.Generator().manual_seed(SEED)).double()
    control = c * uniform / math.sqrt(sum(value.item() ** 2 for value in uniform))
    kept = distances(h, "retain", lambda b, t: h["retain_ref"][b, t])
    return distances(h, "forget", lambda b, t: control) + weight * kept


def retain_kl(z: Logits) -> Tensor:
    terms = []
    for b, row in enumerate(RETAIN):
        for t in range(row.num_context, len(row.ids)):
            p, q = z["retain_ref"][b, t - 1].exp(), z["retain"][b, t - 1].exp()
            p, q = p / p.sum(), q / q.sum()
            terms.append(sum(p[v] * (p[v] / q[v]).log() for v in range(VOCAB)))
    return mean(terms)


def retain_nll(z: Logits) -> Tensor:
    return naive_ce(z["retain"], RETAIN)


Formula = Callable[[Logits, Logits], Tensor]
GOLDEN: list[tuple[Plugin, Formula]] = [
    (NegativePreference(retain_weight=0), lambda z, h: npo(z, 0.1)),
    (NegativePreference(beta=0.7), lambda z, h: npo(z, 0.7) + retain_nll(z)),
    (
        NegativePreference(retain="kl", retain_weight=0.3),
        lambda z, h: npo(z, 0.1) + 0.3 * retain_kl(z),
    ),
    (SimpleNegativePreference(retain_weight=0), lambda z, h: simnpo(z, 4.5, 0.0)),
    (
        SimpleNegativePreference(beta=1.5, gamma=0.8, retain="kl"),
        lambda z, h: simnpo(z, 1.5, 0.8) + retain_kl(z),
    ),
    (WeightedGradientAscent(retain_weight=0), lambda z, h: wga(z, 1.0)),
    (WeightedGradientAscent(beta=0.4), lambda z, h: wga(z, 0.4) + retain_nll(z)),
    (SelfDistillation(), lambda z, h: undial(z, 10.0)),
    (SelfDistillation(beta=1.5, retain_weight=2), lambda z, h: undial(z, 1.5) + 2 * retain_nll(z)),
    (DirectPreference(retain_weight=0), lambda z, h: dpo(z, 0.1)),
    (DirectPreference(beta=0.5, retain="kl"), lambda z, h: dpo(z, 0.5) + retain_kl(z)),
    (RMU(steering_coefficient=3, retain_weight=0.5), lambda z, h: rmu(h, 3, 0.5)),
    (RMU(steering_coefficient=7, retain_weight=0), lambda z, h: rmu(h, 7, 0)),
    (GradientDifference(retain="kl"), lambda z, h: retain_kl(z) - naive_ce(z["forget"], FORGET)),
]
ALGORITHMS = [plugin for plugin, _ in GOLDEN]


def label(plugin: Any) -> str:
    return plugin.name if isinstance(plugin, Plugin) else ""


def random_passes(seed: int) -> tuple[dict[str, Any], Logits, Logits]:
    """Forwards of every pass, their token logits and their hidden states; the original's are constants."""
    z: Logits = {}
    h: Logits = {}
    for number, (name, rows) in enumerate(ROWS.items()):
        at, longest = 1000 * seed + 10 * number, max(len(row.ids) for row in rows)
        z[name], z[f"{name}_ref"] = token_logits(rows, at), token_logits(rows, at + 1).detach()
        h[name] = normal(len(rows), longest, SIZE, seed=at + 2)
        h[f"{name}_ref"] = normal(len(rows), longest, SIZE, seed=at + 3).detach()
    known: dict[str, Any] = {
        name: forward(ROWS[name.removesuffix("_ref")], z[name], hidden={LAYER: h[name]}) for name in z
    }
    return known | {"targets": TARGETS, "seed": SEED}, z, h


def trained(*parts: Logits) -> list[Tensor]:
    return [tensor for part in parts for name, tensor in part.items() if not name.endswith("_ref")]


def value(plugin: Plugin, known: dict[str, Any]) -> Tensor:
    return sum_of(unlearning._call(plugin, known))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("plugin", "formula"), GOLDEN, ids=label)
def test_value_and_gradient_are_the_papers(plugin: Plugin, formula: Formula, seed: int) -> None:
    """Three forget and two retain rows of unequal length, with contexts and padding."""
    known, z, h = random_passes(seed)
    assert_same(value(plugin, known), formula(z, h), trained(z, h))


@pytest.mark.parametrize("plugin", ALGORITHMS, ids=label)
def test_padding_never_counts(plugin: Plugin) -> None:
    """Nor do contexts, of which only RMU makes something: whatever is there, the loss is the same bits."""
    known, z, h = random_passes(seed=3)
    for name, rows in ((name, ROWS[name.removesuffix("_ref")]) for name in z):
        logits, hidden = z[name].detach().clone(), h[name].detach().clone()
        for b, row in enumerate(rows):
            logits[b, : row.num_context - 1] = 50.0
            logits[b, len(row.ids) - 1 :] = torch.arange(VOCAB).double()
            hidden[b, len(row.ids) :] = 1e3
        known[name] = forward(rows, logits, hidden={LAYER: hidden})
    assert torch.equal(value(plugin, known), value(plugin, random_passes(seed=3)[0]))


# --- by hand ---


class TestPreferences:
    """Rows of 1 token of probability 3/4 and of 2 tokens of 1/2: S = -0.28768 and -1.38629."""

    now = one_token((0.75, 1), (0.5, 2))
    before = one_token((0.5, 1), (0.75, 2))  # S = -0.69315 and -0.57536

    def test_npo(self) -> None:
        """beta 1: S - S_ref = ln 3/2 and ln 4/9, so (1 + ratio) = 5/2 and 13/9: 2 (ln 5/2 + ln 13/9) / 2 = 1.28402."""
        loss = NegativePreference(beta=1).loss(self.now, self.before)
        assert list(loss) == ["forget"]
        assert loss["forget"].item() == pytest.approx(math.log(5 / 2) + math.log(13 / 9), abs=1e-6)

    def test_simnpo(self) -> None:
        """beta 1, gamma 0: -2 log sigmoid(-log p) = 2 log(1 + p) with p = 3/4 and 1/2, the means per token: their mean
        is ln 7/4 + ln 3/2 = 0.96508. By sums the second row's p would be 1/4.
        """
        loss = SimpleNegativePreference(beta=1).loss(self.now)
        assert loss["forget"].item() == pytest.approx(math.log(7 / 4) + math.log(3 / 2), abs=1e-6)

    def test_dpo(self) -> None:
        """beta 1, the winners' ratios 4/9 and 3/2 where the losers' are 3/2 and 4/9: 2 log(1 + lost / won) is
        2 ln(1 + 27/8) and 2 ln(1 + 8/27); their mean is ln 35/8 + ln 35/27 = 1.73540.
        """
        won, before = one_token((0.5, 2), (0.75, 1)), one_token((0.75, 2), (0.5, 1))
        loss = DirectPreference(beta=1).loss(won, before, self.now, self.before)
        assert loss["forget"].item() == pytest.approx(math.log(35 / 8) + math.log(35 / 27), abs=1e-6)

    def test_wga(self) -> None:
        """beta 2: (9/16 ln 3/4 + 2 * 1/4 ln 1/2) / 3 = (-0.16182 - 0.34657) / 3 = -0.16946."""
        loss = WeightedGradientAscent(beta=2).loss(self.now)
        assert loss["forget"].item() == pytest.approx(-0.16946, abs=1e-5)

    def test_undial(self) -> None:
        """One token of two, the original's probability 3/4 = 3 : 1; a logit lowered by ln 3 makes 1 : 1. The cross
        entropy of that with (1/2, 1/2) is ln 2.
        """
        loss = SelfDistillation(beta=math.log(3)).loss(one_token((0.5, 1)), one_token((0.75, 1)))
        assert loss["forget"].item() == pytest.approx(math.log(2), abs=1e-6)

    def test_retain_kl(self) -> None:
        """KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 ln 4/3 = 0.14384, times the weight 10."""
        known = one_token((0.75, 1)), one_token((0.5, 1))
        loss = GradientDifference(retain="kl", retain_weight=10).loss(self.now, *known)
        assert loss["retain"].item() == pytest.approx(1.4384, abs=1e-4)


class TestMisdirection:
    """Targets in layers 1 and 4 of the MoE layers 0, 1, 3, 4."""

    def steered(self, plugin: RMU, offsets: Tensor, rows: Sequence[Row], seed: int = SEED) -> Tensor:
        """The forget term where hidden states (B, T, D) are the control vector plus `offsets`."""
        uniform = torch.rand(offsets.shape[-1], generator=torch.Generator().manual_seed(SEED))
        hidden = plugin.steering_coefficient * uniform / uniform.norm() + offsets
        passed = forward(rows, torch.zeros(len(rows), offsets.shape[1], VOCAB), hidden={LAYER: hidden})
        return plugin.loss(TARGETS, seed, passed)["forget"]

    def test_zero_at_the_control_vector_and_only_there(self) -> None:
        plugin, rows = RMU(retain_weight=0), [Row((1, 2, 3)), Row((4, 5))]
        assert self.steered(plugin, torch.zeros(2, 3, 8), rows).item() == 0.0
        assert self.steered(plugin, torch.zeros(2, 3, 8), rows, seed=SEED + 1).item() > 1.0

    def test_every_token_weighs_the_same_in_rows_of_unequal_length(self) -> None:
        """A row of 4 tokens at distance 1 and a row of 1 at distance^2 6: (4 * 1 + 6) / 5 = 2.
        Sums of rows over lengths of all rows, (B,) by (B, 1), would give (4 + 6) / 2 * (1/4 + 1/1) / 2 = 3.125;
        the mean of the rows' means (1 + 6) / 2 = 3.5. What stands in the padding is not looked at.
        """
        offsets = torch.zeros(2, 4, 3)
        offsets[0, :, 1] = 1.0
        offsets[1, 0] = torch.tensor([1.0, 1.0, 2.0])
        offsets[1, 1:] = 9.0
        rows = [Row((1, 2, 3, 4)), Row((5,))]
        assert self.steered(RMU(retain_weight=0), offsets, rows).item() == pytest.approx(2.0, rel=1e-5)

    def test_the_control_vector_is_positive_of_the_given_length_and_the_seeds(self) -> None:
        """At h = 0 the loss is ||c u||^2 = c^2; its gradient -2 c u shows u."""
        hidden = torch.zeros(1, 2, 64).requires_grad_()
        passed = forward([Row((1, 2))], torch.zeros(1, 2, VOCAB), hidden={LAYER: hidden})
        shown = []
        for seed in (0, 0, 1):
            loss = RMU(steering_coefficient=6, retain_weight=0).loss(TARGETS, seed, passed)["forget"]
            assert loss.item() == pytest.approx(36)
            (gradient,) = gradients(loss, [hidden])
            shown.append(-gradient.sum(dim=1)[0] / 12)
        assert shown[0].norm().item() == pytest.approx(1) and (shown[0] >= 0).all()
        assert torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])

    def test_the_layer_is_the_last_target_or_the_middle_one_or_the_given_one(self) -> None:
        everything = Targets((), (0, 1, 3, 4), (0, 1, 3, 4), "softmax")
        asked = [RMU().reads(TARGETS, "forget"), RMU().reads(everything, "retain_ref")]
        assert asked == [Reads(depth=5, hidden=frozenset({4})), Reads(depth=4, hidden=frozenset({3}))]
        assert RMU(layer=2).reads(TARGETS, "forget") == Reads(depth=3, hidden=frozenset({2}))

    @pytest.mark.parametrize("layer", [0, 5, -1])
    def test_a_layer_that_does_not_change_or_exist_is_refused(self, layer: int) -> None:
        with pytest.raises(
            ConfigError, match=rf"algorithm.layer = {layer}: allowed are 1 to 4, from the first"
        ):
            RMU(layer=layer).reads(TARGETS, "forget")


# --- limits that define them ---


def gradient_of(plugin: Plugin, known: dict[str, Any], z: Logits) -> Tensor:
    (found,) = gradients(value(plugin, known), [z["forget"]])
    return found


@pytest.mark.parametrize("beta", [1e-3, 0.1, 5.0])
def test_npos_gradient_at_the_original_is_ascents_on_sequence_sums(beta: float) -> None:
    """-(2 / beta) log sigmoid(-beta x) has the slope 1 at x = 0, whatever beta: exactly d mean(S), scale 1."""
    known, z, _ = random_passes(seed=5)
    known["forget_ref"] = forward(FORGET, z["forget"].detach())
    (ascent,) = gradients(mean(sums(z["forget"], FORGET)), [z["forget"]])
    found = gradient_of(NegativePreference(beta=beta, retain_weight=0), known, z)
    torch.testing.assert_close(found, ascent, rtol=1e-4, atol=1e-6)


def test_npo_with_a_small_beta_is_ascent_everywhere() -> None:
    known, z, _ = random_passes(seed=6)
    (ascent,) = gradients(mean(sums(z["forget"], FORGET)), [z["forget"]])
    found = gradient_of(NegativePreference(beta=1e-5, retain_weight=0), known, z)
    torch.testing.assert_close(found, ascent, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 1.3])
def test_simnpo_is_npo_with_a_constant_reference(gamma: float) -> None:
    """Rows with 4 counted tokens each: 4 SimNPO(beta, gamma) = NPO(beta / 4) with S_ref = -4 gamma / beta."""
    rows, beta = [Row((1, 2, 3, 4, 5)), Row((6, 5, 4, 3, 2, 1), num_context=2)], 4.5
    logits = token_logits(rows, seed=7)
    passed = forward(rows, logits)
    constant = replace(passed, logps=torch.full_like(passed.logps, -gamma / beta).detach())
    simple = SimpleNegativePreference(beta=beta, gamma=gamma).loss(passed)["forget"]
    assert_same(4 * simple, NegativePreference(beta=beta / 4).loss(passed, constant)["forget"], [logits])


def test_dpo_without_a_winner_is_npo() -> None:
    """Winners whose log-probability has not changed: S_idk = S_idk_ref."""
    known, z, _ = random_passes(seed=8)
    known["idk"] = known["idk_ref"]
    same = value(DirectPreference(retain_weight=0), known), value(NegativePreference(retain_weight=0), known)
    assert_same(*same, [z["forget"]])


def test_wga_with_beta_0_is_gradient_ascent() -> None:
    known, z, _ = random_passes(seed=9)
    assert_same(
        value(WeightedGradientAscent(beta=0, retain_weight=0), known),
        value(GradientAscent(), known),
        [z["forget"]],
    )


def test_undial_with_beta_0_stays_at_the_original() -> None:
    """The gradient of CE(p_ref, p) is p - p_ref: 0 where they are equal, and beta moves it away from the token."""
    known, z, _ = random_passes(seed=10)
    known["forget_ref"] = forward(FORGET, z["forget"].detach())
    assert gradient_of(SelfDistillation(beta=0), known, z).abs().max() < 1e-7
    moved = gradient_of(SelfDistillation(beta=3), known, z)
    assert moved[0, 0, FORGET[0].ids[1]] > 1e-5  # descent lowers the token's logit


def test_a_retain_kl_is_0_at_the_original_with_its_gradient() -> None:
    known, z, _ = random_passes(seed=11)
    known["retain_ref"] = forward(RETAIN, z["retain"].detach())
    term = GradientDifference(retain="kl").loss(known["forget"], known["retain"], known["retain_ref"])[
        "retain"
    ]
    assert term.item() == 0.0
    assert gradients(term, [z["retain"]])[0].abs().max() < 1e-7


# --- several ranks ---

BATCH = {
    "forget": [Row((1, 2)), Row((3, 4, 5, 6, 1, 2, 3), num_context=4), Row((6, 5, 4)), Row((1, 3, 5, 2))],
    "idk": [Row((1, 6)), Row((3, 4, 6, 6)), Row((6, 6, 6)), Row((1, 3, 6))],
    "retain": [Row((2, 2, 1)), Row((5, 1)), Row((4, 4, 4, 4, 1, 1)), Row((3, 5))],
}


def on_rank(weights: Logits, mine: Sequence[int], ranks: int) -> dict[str, Any]:
    """Passes of the rows `mine` through a linear model; the global counts are spread over `ranks`."""
    known: dict[str, Any] = {"targets": TARGETS, "seed": SEED}
    for seed, (name, rows) in enumerate(BATCH.items()):
        whole = collate(rows, 0)
        counts = {
            "num_tokens": float(whole.counted.sum()) / ranks,
            "num_sequences": len(rows) / ranks,
            "num_routed": float(whole.attention.sum()) / ranks,
        }
        part = [rows[i] for i in mine]
        longest = max(len(row.ids) for row in part)
        inputs = normal(len(rows), 7, SIZE, seed=50 + seed).detach()[list(mine), :longest]
        for kind, scale in ((name, 1.0), (f"{name}_ref", 0.5)):
            hidden = inputs @ (weights["body"] if kind == name else weights["body"].detach() * scale)
            known[kind] = forward(part, hidden @ weights["head"], hidden={LAYER: hidden}, **counts)
    return known


@pytest.mark.parametrize("plugin", ALGORITHMS, ids=label)
@pytest.mark.parametrize("split", [([0, 1, 2], [3]), ([1], [0, 2, 3])])
def test_averaged_gradients_of_ranks_are_the_whole_batchs(
    plugin: Plugin, split: tuple[list[int], list[int]]
) -> None:
    """However unevenly tokens, rows and counted tokens fall; micro-batches of one rank add up the same way."""
    weights = {"body": normal(SIZE, SIZE, seed=60), "head": normal(SIZE, VOCAB, seed=61).detach()}
    whole = value(plugin, on_rank(weights, range(4), ranks=1))
    parts = [value(plugin, on_rank(weights, mine, ranks=2)) for mine in split]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=1e-6)
    ours = sum(gradients(part, [weights["body"]])[0] for part in parts) / 2
    torch.testing.assert_close(ours, gradients(whole, [weights["body"]])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plugin", ALGORITHMS, ids=label)
def test_a_filler_adds_nothing_to_value_or_gradient(plugin: Plugin) -> None:
    """log sigmoid(0) is not 0: a row without any counted token must not be a sequence."""
    known, z, h = random_passes(seed=12)
    for name in z:
        rows = ROWS[name.removesuffix("_ref")]
        filler = collate(rows, 0).filler()
        counted = {"mask": filler.counted[:, 1:], "real": filler.routed}
        known[name] = replace(known[name], **counted, num_tokens=9.0, num_sequences=3.0, num_routed=15.0)
    loss = value(plugin, known)
    assert loss.item() == 0.0
    for gradient in gradients(loss, trained(z, h)):
        assert (gradient == 0).all()


# --- for any input ---

LARGE = 1e36
ANY = st.floats(-LARGE, LARGE) | st.floats(-30, 30)
TYPES = st.sampled_from([torch.float32, torch.bfloat16])


@st.composite
def tables(draw: st.DrawFn, shape: tuple[int, ...], values: st.SearchStrategy[float] = ANY) -> Tensor:
    numbers = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(numbers).view(shape).to(draw(TYPES))


@given(tables((1, 3, VOCAB)), tables((1, 3, VOCAB)), tables((1, 3, 2), st.floats(-1e17, 1e17)))
@settings(max_examples=60, deadline=None)
def test_losses_are_finite_for_finite_logits(now: Tensor, before: Tensor, hidden: Tensor) -> None:
    """Values and gradients, in the range of float32 and bfloat16; a squared hidden state must fit into it, too."""
    rows, leaves = [Row((1, 2, 3))], [now.requires_grad_(), hidden.requires_grad_()]
    current = forward(rows, now, hidden={LAYER: hidden})
    original = forward(rows, before, hidden={LAYER: -hidden.detach()})
    known: dict[str, Any] = {"targets": TARGETS, "seed": SEED}
    for name in ROWS:
        known |= {name: current, f"{name}_ref": original}
    for plugin in ALGORITHMS:
        loss = value(plugin, known)
        assert torch.isfinite(loss), plugin
        for gradient in gradients(loss, leaves):
            assert torch.isfinite(gradient).all(), plugin
