"""Attribution against loops and real routing traces; plans against the checkpoint's own tensor names."""

from __future__ import annotations

import functools
import gzip
import json
import math
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PROVENANCE, save_tiny
from torch import Tensor

from seuf_ray.artifacts import AttributionReport, DataSummary, Expert, LayerScores, Provenance, UnlearningPlan
from seuf_ray.attribution.bootstrap import Bootstrap
from seuf_ray.attribution.esft import esft_experts
from seuf_ray.attribution.report import chosen, make_report
from seuf_ray.attribution.results import unit_result
from seuf_ray.attribution.selection import choose_targets
from seuf_ray.attribution.statistics import RoutingStatistics, unit_statistics
from seuf_ray.attribution.units import pack_chunk, read_chunks
from seuf_ray.checkpoint.folder import Checkpoint, resolve
from seuf_ray.config import AttributionConfig, DataConfig, TargetsConfig
from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Row
from seuf_ray.errors import ConfigError
from seuf_ray.families import Scoring, Shape
from seuf_ray.model.moe import MoEModel, load_tokenizer

DATA = DataSummary(sources=["traces"], num_texts=1, num_rows=1, num_tokens=1)
TRACES = (
    Path(__file__).parents[2] / "shared" / "data" / "esft_routing"
)  # ESFT's release, where it lies beside us


def shape(*layers: int, experts: int, top_k: int, scoring: Scoring = "softmax") -> Shape:
    return Shape(max(layers) + 1, tuple(layers), experts, top_k, scoring)


@pytest.fixture(scope="module", params=["qwen2_moe", "deepseek_v3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny(tmp_path_factory.mktemp(request.param) / "model", request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny(tmp_path_factory.mktemp("qwen") / "model", "qwen2_moe"))


def report_of(
    statistics: RoutingStatistics,
    sizes: Shape,
    checkpoint: Checkpoint,
    retain: RoutingStatistics | None = None,
    targets: TargetsConfig | None = None,
    **attribution: Any,
) -> AttributionReport:
    settings, wanted = AttributionConfig(**attribution), targets or TargetsConfig()
    identity = checkpoint.identity("tiny")
    return make_report(statistics, retain, sizes, settings, wanted, identity, DATA, None, PROVENANCE)


def unit(
    logits: dict[int, Tensor],
    choices: dict[int, Tensor],
    lengths: Sequence[int],
    sizes: Shape,
    bootstrap: Bootstrap | None = None,
    first: int = 0,
) -> RoutingStatistics:
    """The statistics of sequences `first`, `first + 1`, ..."""
    indices = range(first, first + len(lengths))
    return unit_statistics(logits, choices, (bootstrap or Bootstrap()).sequences(lengths, indices), sizes)


# --- statistics ---


class TestUnitStatistics:
    def test_affinity_is_the_mean_of_the_sequences_means(self) -> None:
        """Two experts, top-1, scores (0.8, 0.2) or (0.4, 0.6). Sequence A is one token (0.8, 0.2); sequence B is
        three tokens (0.4, 0.6). Gates: A (0.8, 0), B (0, 0.6) each, so affinity = (0.8 / 2, 0.6 / 2) = (0.4, 0.3):
        expert 0 wins. The mean over tokens would be (0.8 / 4, 1.8 / 4) = (0.2, 0.45): expert 1 would.
        router_score = ((0.8 + 0.4) / 2, (0.2 + 0.6) / 2) = (0.6, 0.4); token_share = (1/4, 3/4).
        """
        logits = torch.tensor([[0.8, 0.2], *[[0.4, 0.6]] * 3]).log()
        found = unit({0: logits}, {0: logits.argmax(1, keepdim=True)}, [1, 3], shape(0, experts=2, top_k=1))
        assert (found.num_sequences, found.num_tokens) == (2, 4)
        assert (found.affinity / 2**32 / 2).tolist()[0] == pytest.approx([0.4, 0.3], abs=1e-7)
        assert (found.router_score / 2**32 / 2).tolist()[0] == pytest.approx([0.6, 0.4], abs=1e-7)
        assert found.slots.tolist() == [[1, 3]]

    @pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
    def test_statistics_are_those_of_a_loop(self, scoring: Scoring) -> None:
        """Unequal lengths, two layers, and choices that are not the best scores."""
        lengths, sizes = [1, 4, 2, 6], shape(1, 2, experts=5, top_k=2, scoring=scoring)
        logits, choices = random_unit(lengths, sizes, seed=3)
        found = unit(logits, choices, lengths, sizes)
        for i, layer in enumerate(sizes.moe_layers):
            affinity, score, slots = naive_statistics(logits[layer], choices[layer], lengths, scoring)
            assert (found.affinity[i] / 2**32).tolist() == pytest.approx(affinity, rel=1e-6)
            assert (found.router_score[i] / 2**32).tolist() == pytest.approx(score, rel=1e-6)
            assert found.slots[i].tolist() == slots
        assert (found.num_sequences, found.num_tokens) == (4, 13)

    @given(st.randoms(use_true_random=False), st.integers(1, 6))
    @settings(max_examples=30, deadline=None)
    def test_units_add_up_to_the_same_bits_in_any_order_and_grouping(
        self, shuffle: random.Random, size: int
    ) -> None:
        """What actors return, in whatever order they finish, whoever adds the first of them up."""
        units = [unit_of([2, 3 + seed % 4, 1], seed) for seed in range(9)]
        whole = functools.reduce(operator.add, units)
        mixed = shuffle.sample(units, len(units))
        groups = [functools.reduce(operator.add, mixed[i : i + size]) for i in range(0, len(units), size)]
        assert functools.reduce(operator.add, groups).digest() == whole.digest()
        assert whole.digest() != functools.reduce(operator.add, units[1:]).digest()

    def test_statistics_of_a_model_do_not_see_padding(self, qwen: Checkpoint) -> None:
        """The same rows in a longer batch: equal choices, and sums that agree to float32."""
        rows = [Row((5, 9, 2, 44)), Row((7, 1)), Row((3, 3, 8, 60, 61, 2))]
        model = MoEModel(qwen)
        lengths = [len(row.ids) for row in rows]
        with torch.no_grad():
            plain, padded = (
                unit(*model.route(collate(rows, 0, length=length)), lengths, model.shape)
                for length in (6, 17)
            )
        assert (plain.slots == padded.slots).all() and plain.slots.sum() == 3 * 2 * 12
        torch.testing.assert_close(
            torch.tensor(plain.affinity / 2**32), torch.tensor(padded.affinity / 2**32), rtol=1e-5, atol=1e-6
        )


def naive_statistics(
    logits: Tensor, choices: Tensor, lengths: Sequence[int], scoring: Scoring
) -> tuple[list[float], list[float], list[int]]:
    num_experts = logits.shape[1]
    affinity, score, slots = [0.0] * num_experts, [0.0] * num_experts, [0] * num_experts
    token = 0
    for length in lengths:
        for _ in range(length):
            z = logits[token].tolist()
            total = sum(math.exp(value) for value in z)
            for e in range(num_experts):
                s = math.exp(z[e]) / total if scoring == "softmax" else 1 / (1 + math.exp(-z[e]))
                chosen = e in choices[token].tolist()
                affinity[e] += s / length if chosen else 0.0
                score[e] += s / length
                slots[e] += chosen
            token += 1
    return affinity, score, slots


def random_unit(
    lengths: Sequence[int], sizes: Shape, seed: int
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    generator, shuffle, n = torch.Generator().manual_seed(seed), random.Random(seed), sum(lengths)
    logits = {at: 2 * torch.randn(n, sizes.num_experts, generator=generator) for at in sizes.moe_layers}
    picks = range(sizes.num_experts)
    choices = {
        at: torch.tensor([shuffle.sample(picks, sizes.top_k) for _ in range(n)]) for at in sizes.moe_layers
    }
    return logits, choices


def unit_of(lengths: Sequence[int], seed: int, score: Any = "affinity") -> RoutingStatistics:
    """Sequences 100 * seed, 100 * seed + 1, ..., with 7 replicates."""
    sizes, bootstrap = shape(0, 1, experts=5, top_k=2), Bootstrap(seed=11, replicates=7, score=score)
    return unit(*random_unit(lengths, sizes, seed), lengths, sizes, bootstrap, first=100 * seed)


# --- reports ---


class TestReport:
    def test_scores_are_sums_over_counts(self, qwen: Checkpoint) -> None:
        """Affinity and router score per sequence, token share per (token, k) slot: it adds up to 1 in every layer."""
        sizes, lengths = shape(0, 1, experts=5, top_k=2), [2, 5, 3]
        logits, choices = random_unit(lengths, sizes, seed=8)
        report = report_of(unit(logits, choices, lengths, sizes), sizes, qwen, score="router_score")
        for row in report.layers:
            affinity, score, slots = naive_statistics(
                logits[row.layer], choices[row.layer], lengths, "softmax"
            )
            assert row.affinity == pytest.approx([value / 3 for value in affinity], rel=1e-6)
            assert row.router_score == pytest.approx([value / 3 for value in score], rel=1e-6)
            assert row.token_share == pytest.approx([slot / 20 for slot in slots])
            assert sum(row.token_share) == pytest.approx(1) and sum(row.router_score) == pytest.approx(1)
        assert report.score == "router_score"
        best = max((row.router_score[e], (row.layer, e)) for row in report.layers for e in range(5))
        assert report.ranked()[0] == best

    def test_uniform_routing_is_warned_of(self, qwen: Checkpoint) -> None:
        """Eight tokens that choose experts 0-7 in turn: every share is 1/8, 1.0 times the uniform one."""
        sizes = shape(0, experts=8, top_k=1)
        statistics = unit({0: torch.zeros(8, 8)}, {0: torch.arange(8)[:, None]}, [8], sizes)
        warning = report_of(statistics, sizes, qwen).warnings[0]
        assert "no expert stands out" in warning and "1.0 times the uniform share" in warning

    @pytest.mark.parametrize(("times", "warned"), [(2, True), (3, False), (8, False)])
    def test_concentrated_routing_is_not(self, qwen: Checkpoint, times: int, warned: bool) -> None:
        """Expert 5 of 8 gets `times` of 8 tokens: `times` times the uniform share; 3 are enough. One layer will do."""
        sizes = shape(0, 1, experts=8, top_k=1)
        even = torch.arange(8)[:, None]
        skewed = torch.tensor([5] * times + [e for e in range(8) if e != 5][: 8 - times])[:, None]
        statistics = unit({0: torch.zeros(8, 8), 1: torch.zeros(8, 8)}, {0: even, 1: skewed}, [8], sizes)
        warnings = report_of(statistics, sizes, qwen).warnings
        assert any("no expert stands out" in text for text in warnings) == warned

    def test_an_expert_that_is_no_target_does_not_count(self, qwen: Checkpoint) -> None:
        """Gates of 1 in layer 0, one token each: 1/8. In layer 1 expert 5 gets 4 of 8 tokens at gates of 1/8: 1/16.

        So the target lies in layer 0 and has the uniform share, whatever layer 1 does.
        """
        sizes = shape(0, 1, experts=8, top_k=1)
        even, skewed = torch.arange(8)[:, None], torch.tensor([5, 5, 5, 5, 0, 1, 2, 3])[:, None]
        logits = {0: 50 * torch.eye(8), 1: torch.zeros(8, 8)}
        warning = report_of(unit(logits, {0: even, 1: skewed}, [8], sizes), sizes, qwen).warnings[0]
        assert "no expert stands out" in warning and "1.0 times the uniform share" in warning

    @pytest.mark.parametrize(("name", "warned"), [("specialised", False), ("unspecialised", True)])
    def test_the_embedded_checkpoints_differ_in_it(self, name: str, warned: bool) -> None:
        """400 texts about chemistry, as one unit."""
        checkpoint = Checkpoint(resolve(f"embedded:{name}"))
        (chunk,) = read_chunks("forget", ["embedded:chemistry"], DataConfig(max_rows=400))
        (packed,) = pack_chunk(chunk, load_tokenizer(checkpoint), 256, 64)
        bootstraps = {"forget": Bootstrap(0, 0)}
        found = RoutingStatistics.from_record(unit_result(MoEModel(checkpoint), packed, bootstraps, 0))
        warnings = report_of(found, checkpoint.shape, checkpoint).warnings
        assert any("no expert stands out" in text for text in warnings) == warned


class TestConfidence:
    """Layers of 4 experts, top-1, one-hot routing: affinity is the share of each sequence's tokens."""

    def test_weights_are_poisson_and_know_the_sequence_only(self) -> None:
        """64 x 4,000 draws: mean and variance 1 within 5 standard errors (.002 and .0035); P(0) = exp(-1) = .3679."""
        bootstrap = Bootstrap(seed=3, replicates=64)
        weights = bootstrap.weights(range(4000))
        assert abs(weights.mean() - 1) < 0.01 and abs(weights.var() - 1) < 0.018
        assert abs((weights == 0).mean() - math.exp(-1)) < 0.005
        assert (bootstrap.weights([17, 3]) == weights[:, [17, 3]]).all()
        assert (Bootstrap(seed=4, replicates=64).weights(range(4000)) != weights).any()

    @pytest.mark.parametrize("score", ["affinity", "router_score", "token_share"])
    def test_replicates_are_the_statistics_of_the_resampled_sequences(self, score: Any) -> None:
        """Each sequence by itself, taken as often as the weights say, adds up to the replicate."""
        sizes, bootstrap = shape(0, 1, experts=5, top_k=2), Bootstrap(seed=11, replicates=7, score=score)
        found, weights = unit_of([2, 5, 1], 4, score), bootstrap.weights([400, 401, 402])
        logits, choices = random_unit([2, 5, 1], sizes, 4)
        name = "slots" if score == "token_share" else score
        parts = []
        for start, end in ((0, 2), (2, 7), (7, 8)):
            one = {layer: z[start:end] for layer, z in logits.items()}
            picks = {layer: c[start:end] for layer, c in choices.items()}
            parts.append(getattr(unit(one, picks, [end - start], sizes), name))
        for r in range(7):
            assert (
                found.replicates[r] == sum(w * part for w, part in zip(weights[r], parts, strict=True))
            ).all()
        lengths = [2, 5, 1] if score == "token_share" else [1, 1, 1]
        assert found.counts.tolist() == [
            sum(w * n for w, n in zip(row, lengths, strict=True)) for row in weights
        ]

    def test_records_travel(self) -> None:
        found = unit_of([2, 5, 1], 4)
        assert RoutingStatistics.from_record({**found.to_record(), "unit": 3}).digest() == found.digest()
        empty = RoutingStatistics.zero(2, 5, Bootstrap(seed=11, replicates=7))
        assert (empty + found).digest() == found.digest()

    def test_a_planted_tie_is_named_with_its_stability(self, qwen: Checkpoint) -> None:
        """Expert 2 takes 21 sequences of 40 whole, expert 1 takes 19: 1.11 times; a resampling turns that round about
        four times in ten. A clear winner (30 of 40) stays in every one and is not warned of.
        """
        close = self.report([2] * 21 + [1] * 19, qwen)
        stays = close.layers[0].stability
        (warning,) = [text for text in close.warnings if "near tie" in text]
        assert (
            f"layer 0 expert 2 leads layer 0 expert 1 by 1.11x and stays a target in {stays[2]:.0%}"
            in warning
        )
        assert 0.4 < stays[2] < 0.8 and stays[1] == pytest.approx(1 - stays[2]) and stays[0] == stays[3] == 0
        clear = self.report([2] * 30 + [1] * 10, qwen)
        assert clear.layers[0].stability[2] == 1 and not any("near tie" in text for text in clear.warnings)

    def test_ranks_and_margins(self, qwen: Checkpoint) -> None:
        """Affinities (0, .475, .525, 0): ranks 3, 2, 1, 4; margins to the next 0, .475, .05 and 0 for the last."""
        row = self.report([2] * 21 + [1] * 19, qwen).layers[0]
        assert row.rank == [3, 2, 1, 4]
        assert row.margin == pytest.approx([0, 0.475, 0.05, 0], abs=1e-6)

    def test_without_replicates_there_is_no_stability(self, qwen: Checkpoint) -> None:
        report = self.report([2] * 30 + [1] * 10, qwen, bootstrap=0)
        assert report.layers[0].stability == [] and report.bootstrap == 0

    def test_a_generic_expert_is_warned_of_and_contrast_passes_it_by(self, qwen: Checkpoint) -> None:
        """Forget: expert 2 takes 30 of 40, expert 1 takes 10; retain: expert 2 takes all. Affinity chooses 2, which is
        as active there; contrast is .75 - 1 for it and .25 - 0 for expert 1.
        """
        retain = self.statistics([2] * 40, "retain", "affinity")
        by_affinity = self.report([2] * 30 + [1] * 10, qwen, retain=retain)
        (warning,) = [text for text in by_affinity.warnings if "generic expert" in text]
        assert "layer 0 expert 2 has affinity 0.750 on forget and 1.000 on retain text" in warning
        retain = self.statistics([2] * 40, "retain", "contrast")
        by_contrast = self.report([2] * 30 + [1] * 10, qwen, retain=retain, score="contrast")
        assert by_contrast.ranked()[0] == (pytest.approx(0.25, abs=1e-6), (0, 1))
        assert by_contrast.layers[0].stability[1] == 1
        assert not any("generic expert" in text for text in by_contrast.warnings)

    def test_contrast_needs_a_retain_set(self, qwen: Checkpoint) -> None:
        with pytest.raises(ConfigError, match="contrast.*data.retain is needed"):
            self.report([2, 1], qwen, score="contrast")

    @pytest.mark.parametrize(
        ("scope", "expected"),
        [
            ("model", [[0, 1, 0], [1, 0, 0]]),
            ("layer", [[1, 1, 0], [1, 0, 1]]),
            ("same_layer", [[0, 0, 0], [1, 0, 1]]),
        ],
    )
    def test_scopes_choose_as_plans_do(self, scope: Any, expected: list[list[int]]) -> None:
        """Top-2 of ((.2, .5, .1), (.6, .1, .3)), with and without a leading axis."""
        values = np.array([[0.2, 0.5, 0.1], [0.6, 0.1, 0.3]])
        assert chosen(values, scope, 2).astype(int).tolist() == expected
        assert chosen(np.stack([values, values]), scope, 2).astype(int).tolist() == [expected, expected]

    def report(
        self,
        winners: list[int],
        qwen: Checkpoint,
        retain: RoutingStatistics | None = None,
        **attribution: Any,
    ) -> AttributionReport:
        settings = {"bootstrap": 200, **attribution}
        forget = self.statistics(winners, "forget", settings.get("score", "affinity"), settings["bootstrap"])
        return report_of(forget, shape(0, experts=4, top_k=1), qwen, retain, **settings)

    def statistics(
        self, winners: list[int], data: Any, score: Any, bootstrap: int = 200
    ) -> RoutingStatistics:
        """One-token sequences, each with score 1 for its winner."""
        made = Bootstrap.of(AttributionConfig(score=score, bootstrap=bootstrap), 0, data)
        picks = torch.tensor(winners)[:, None]
        logits = torch.full((len(winners), 4), -40.0).scatter(1, picks, 40.0)
        sizes = shape(0, experts=4, top_k=1)
        return unit({0: logits}, {0: picks}, [1] * len(winners), sizes, made)


# --- plans ---


def scored(checkpoint: Checkpoint, scores: dict[Expert, float]) -> AttributionReport:
    """A report with these affinities, 0 elsewhere."""
    sizes = checkpoint.shape
    layers = []
    for layer in sizes.moe_layers:
        row = [scores.get((layer, e), 0.0) for e in range(sizes.num_experts)]
        layers.append(LayerScores(layer=layer, affinity=row, router_score=row[::-1], token_share=row))
    return AttributionReport(
        model=checkpoint.identity("tiny"),
        provenance=PROVENANCE,
        score="affinity",
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        data=DATA,
        digest="0" * 64,
        layers=layers,
        warnings=[],
    )


SCORES: dict[Expert, float] = {(2, 6): 0.9, (1, 3): 0.8, (2, 0): 0.7, (1, 1): 0.6, (2, 7): 0.5}


def plan_of(
    checkpoint: Checkpoint, *, seed: int = 0, train_routers: bool = True, **targets: Any
) -> UnlearningPlan:
    made = Provenance(seed=seed, made_from={}, packages={})
    report = scored(checkpoint, SCORES)
    return choose_targets(report, TargetsConfig(**targets), checkpoint, made, train_routers=train_routers)


def sizes_of(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    return sum(checkpoint.read(name).numel() for name in names)


class TestScopes:
    def test_model_takes_the_best_of_all_layers(self, checkpoint: Checkpoint) -> None:
        """One expert of three 16 x 32 projections and its router of 8 x 32: 1536 + 256 parameters."""
        plan = plan_of(checkpoint)
        assert (plan.experts, plan.routers, plan.scope, plan.top_m) == ([(2, 6)], [2], "model", 1)
        assert plan.tensors == [
            "model.layers.2.mlp.experts.6.down_proj.weight",
            "model.layers.2.mlp.experts.6.gate_proj.weight",
            "model.layers.2.mlp.experts.6.up_proj.weight",
            "model.layers.2.mlp.gate.weight",
        ]
        assert plan.num_trainable == 1536 + 256
        assert plan.trainable_fraction == (1536 + 256) / checkpoint.num_parameters
        assert not plan.is_full and plan.first_layer == 2

    def test_model_with_three(self, checkpoint: Checkpoint) -> None:
        plan = plan_of(checkpoint, top_m=3)
        assert plan.experts == [(1, 3), (2, 0), (2, 6)] and plan.routers == [1, 2]
        assert plan.num_trainable == 3 * 1536 + 2 * 256

    def test_same_layer_takes_the_best_experts_neighbours(self, checkpoint: Checkpoint) -> None:
        """(1, 3) is the second best, but of another layer."""
        plan = plan_of(checkpoint, scope="same_layer", top_m=3)
        assert plan.experts == [(2, 0), (2, 6), (2, 7)] and plan.routers == [2]

    def test_layer_takes_the_best_of_every_moe_layer(self, checkpoint: Checkpoint) -> None:
        """Layer 0 has no scores (ties: the lowest indices) or, in DeepSeek, no experts."""
        plan = plan_of(checkpoint, scope="layer", top_m=2)
        first = [(0, 0), (0, 1)] if 0 in checkpoint.shape.moe_layers else []
        assert plan.experts == [*first, (1, 1), (1, 3), (2, 0), (2, 6)]
        assert plan.routers == list(checkpoint.shape.moe_layers)

    def test_explicit_takes_what_it_is_told_once(self, checkpoint: Checkpoint) -> None:
        plan = plan_of(checkpoint, scope="explicit", experts=[(2, 1), (1, 7), (2, 1)])
        assert plan.experts == [(1, 7), (2, 1)] and plan.routers == [1, 2]

    def test_random_is_as_random_as_its_seed(self, checkpoint: Checkpoint) -> None:
        """The same seed gives the same plan, some other another, and all are of one shape."""
        plans = [plan_of(checkpoint, scope="random", top_m=2, seed=seed) for seed in range(6)]
        assert plans[3] == plan_of(checkpoint, scope="random", top_m=2, seed=3)
        assert len({tuple(plan.experts) for plan in plans}) > 1
        for plan in plans:
            assert len(set(plan.experts)) == 2 and plan.experts == sorted(plan.experts)
            assert all(layer in checkpoint.shape.moe_layers and 0 <= e < 8 for layer, e in plan.experts)
            assert len(plan.tensors) == 3 * 2 + len(plan.routers)

    def test_random_does_not_look_at_the_scores(self, qwen: Checkpoint) -> None:
        made = Provenance(seed=4, made_from={}, packages={})
        config = TargetsConfig(scope="random", top_m=3)
        reports = scored(qwen, SCORES), scored(qwen, {(0, 0): 1.0})
        one, other = (choose_targets(report, config, qwen, made) for report in reports)
        assert one.experts == other.experts

    def test_full_is_every_parameter(self, checkpoint: Checkpoint) -> None:
        plan = plan_of(checkpoint, scope="full")
        assert plan.is_full and plan.experts == [] and plan.tensors == []
        assert plan.num_trainable == sizes_of(checkpoint, list(checkpoint.files)) == checkpoint.num_parameters
        assert plan.trainable_fraction == 1.0 and plan.routers == list(checkpoint.shape.moe_layers)

    def test_full_without_its_routers_does_not_exist(self, checkpoint: Checkpoint) -> None:
        """It would train them all the same: the plan of everything names no tensor."""
        with pytest.raises(ConfigError, match="targets.scope = 'full' trains every router"):
            plan_of(checkpoint, scope="full", train_routers=False)

    @pytest.mark.parametrize("train_routers", [True, False])
    @pytest.mark.parametrize(
        "targets",
        [
            {"top_m": 4},
            {"scope": "layer", "top_m": 8},
            {"scope": "same_layer", "top_m": 8},
            {"scope": "random", "top_m": 5},
            {"scope": "explicit", "experts": [(1, 0)]},
        ],
    )
    def test_tensors_are_named_and_counted_as_in_the_checkpoint(
        self, checkpoint: Checkpoint, targets: dict[str, Any], train_routers: bool
    ) -> None:
        plan = plan_of(checkpoint, train_routers=train_routers, **targets)
        assert set(plan.tensors) <= set(checkpoint.files)
        assert len(set(plan.tensors)) == len(plan.tensors) == 3 * len(plan.experts) + len(plan.routers)
        assert plan.num_trainable == sizes_of(checkpoint, plan.tensors)
        assert plan.trainable_fraction == plan.num_trainable / sizes_of(checkpoint, list(checkpoint.files))
        assert plan.routers == (sorted({layer for layer, _ in plan.experts}) if train_routers else [])
        assert any("mlp.gate.weight" in name for name in plan.tensors) == train_routers

    def test_ties_go_to_the_lower_layer_then_the_lower_index(self, checkpoint: Checkpoint) -> None:
        made = Provenance(seed=0, made_from={}, packages={})
        report = scored(checkpoint, {(2, 0): 0.5, (1, 6): 0.5, (1, 2): 0.5, (2, 5): 0.4})
        for top_m, expected in [(1, [(1, 2)]), (2, [(1, 2), (1, 6)]), (3, [(1, 2), (1, 6), (2, 0)])]:
            assert choose_targets(report, TargetsConfig(top_m=top_m), checkpoint, made).experts == expected
        same_layer = choose_targets(report, TargetsConfig(scope="same_layer", top_m=2), checkpoint, made)
        assert same_layer.experts == [(1, 2), (1, 6)]

    def test_the_reports_own_score_ranks(self, qwen: Checkpoint) -> None:
        """Router scores are the affinities of the experts in reverse order: (2, 6) becomes (2, 1)."""
        report = scored(qwen, SCORES).model_copy(update={"score": "router_score"})
        plan = choose_targets(report, TargetsConfig(), qwen, PROVENANCE)
        assert plan.experts == [(2, 1)]


class TestRefusals:
    @pytest.mark.parametrize("expert", [(2, 8), (2, -1), (3, 0), (-1, 0)])
    def test_an_expert_that_the_model_does_not_have_is_named(
        self, checkpoint: Checkpoint, expert: Expert
    ) -> None:
        words = rf"targets.experts: \[{expert[0]}, {expert[1]}\] is not in this model; layers \d-2 have experts 0-7"
        with pytest.raises(ConfigError, match=words):
            plan_of(checkpoint, scope="explicit", experts=[(1, 0), expert])

    def test_a_dense_layer_has_no_experts(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint(save_tiny(tmp_path / "model", "deepseek_v3"))
        with pytest.raises(ConfigError, match=r"\[0, 0\] is not in this model; layers 1-2"):
            plan_of(checkpoint, scope="explicit", experts=[(0, 0)])

    @pytest.mark.parametrize("scope", ["model", "layer", "same_layer", "random"])
    def test_more_experts_than_there_are_are_refused(self, checkpoint: Checkpoint, scope: Any) -> None:
        """Eight in a layer; in the model, eight times the MoE layers. The last that exists is still accepted."""
        most = 8 * (len(checkpoint.shape.moe_layers) if scope in ("model", "random") else 1)
        assert len(plan_of(checkpoint, scope=scope, top_m=most).experts) >= most
        words = f"targets.top_m = {most + 1}: scope '{scope}' has only {most} experts"
        with pytest.raises(ConfigError, match=words):
            plan_of(checkpoint, scope=scope, top_m=most + 1)


# --- real traces: DeepSeek-V2-Lite on a translation task, released with ESFT (MIT) ---


@dataclass(frozen=True)
class Traces:
    """Layer -> (N, 6) chosen experts and their un-renormalised softmax scores, 40 sequences after each other."""

    ids: dict[int, Tensor]
    gates: dict[int, Tensor]
    lengths: list[int]

    @property
    def shape(self) -> Shape:
        return shape(*sorted(self.ids), experts=64, top_k=6)

    def logits(self) -> dict[int, Tensor]:
        """Router logits whose softmax is the recorded gate at chosen experts; the 58 others share what is left."""
        found = {}
        for layer, gates in self.gates.items():
            rest = (1 - gates.sum(dim=1, keepdim=True)).clamp(min=1e-6) / 58
            found[layer] = rest.expand(-1, 64).scatter(1, self.ids[layer], gates.clamp(min=1e-9)).log()
        return found


@pytest.fixture(scope="module")
def traces() -> Traces:
    if not TRACES.is_dir():
        pytest.skip("ESFT's traces are not here")
    ids, gates, lengths = {}, {}, []
    for layer in range(1, 27):
        text = gzip.decompress(
            (TRACES / "raw_translation" / f"expert_weights_{layer}.txt.gz").read_bytes()
        ).decode()
        lines = [line.split("\t\t") for line in text.splitlines()]
        ids[layer] = torch.tensor([int(x) for line in lines for x in line[0].split()]).view(-1, 6)
        gates[layer] = torch.tensor([float(x) for line in lines for x in line[1].split()]).view(-1, 6)
        lengths = [len(line[0].split()) // 6 for line in lines]
    return Traces(ids, gates, lengths)


@pytest.fixture(scope="module")
def traced(traces: Traces) -> list[RoutingStatistics]:
    """One sequence per unit."""
    logits, parts = traces.logits(), []
    for first, length in zip(
        torch.tensor([0, *traces.lengths]).cumsum(0).tolist(), traces.lengths, strict=False
    ):
        part = slice(first, first + length)
        one = {layer: z[part] for layer, z in logits.items()}
        chosen = {layer: picks[part] for layer, picks in traces.ids.items()}
        parts.append(unit(one, chosen, [length], traces.shape))
    return parts


class TestRealTraces:
    """unit_statistics is fed logits built so that their softmax has the recorded gates (see `Traces.logits`)."""

    def test_token_shares_are_the_released_ones(
        self, traces: Traces, traced: list[RoutingStatistics], qwen: Checkpoint
    ) -> None:
        """8251 tokens x 6 slots; ESFT's file has four decimals."""
        report = report_of(functools.reduce(operator.add, traced), traces.shape, qwen)
        summary = json.loads((TRACES / "summary_translation.json").read_text())["token_scores"]
        assert sum(part.num_tokens for part in traced) == 8251 and len(traced) == 40
        for row in report.layers:
            released = [summary[str(row.layer)][str(e)] for e in range(64)]
            assert row.token_share == pytest.approx(released, abs=5.001e-5, rel=0)

    def test_mean_gates_are_the_released_ones(self, traces: Traces, traced: list[RoutingStatistics]) -> None:
        """ESFT's gate score is the mean over tokens: sum_j L_j * (mean gate of sequence j) / sum_j L_j."""
        summary = json.loads((TRACES / "summary_translation.json").read_text())["gate_scores"]
        sums = sum(part.affinity / 2**32 * part.num_tokens for part in traced)
        for i, layer in enumerate(traces.shape.moe_layers):
            released = [summary[str(layer)][str(e)] for e in range(64)]
            assert (sums[i] / 8251).tolist() == pytest.approx(released, abs=1e-4, rel=0)

    def test_esfts_rule_chooses_the_released_experts(
        self, traces: Traces, traced: list[RoutingStatistics], qwen: Checkpoint
    ) -> None:
        """By descending token share, until the cumulative share reaches 0.2."""
        report = report_of(functools.reduce(operator.add, traced), traces.shape, qwen, score="token_share")
        released = json.loads((TRACES / "expert_config_translation.json").read_text())["experts"]
        assert len(released) == len(report.layers) == 26
        found = esft_experts(report, 0.2)
        for row in report.layers:
            assert [e for layer, e in found if layer == row.layer] == released[str(row.layer)], row.layer

    def test_esfts_rule_chooses_the_released_experts_for_intent_as_well(self, traces: Traces) -> None:
        """Only its token shares were released, rounded: layer 9's add up to 1.0006, and four of them to .2001."""
        summary = json.loads((TRACES / "summary_intent.json").read_text())["token_scores"]
        released = json.loads((TRACES / "expert_config_intent.json").read_text())["experts"]
        shares = {
            layer: [summary[str(layer)][str(e)] for e in range(64)] for layer in traces.shape.moe_layers
        }
        layers = [
            LayerScores(layer=at, affinity=[], router_score=[], token_share=s) for at, s in shares.items()
        ]
        report = records.attribution(1).model_copy(update={"layers": layers, "score": "token_share"})
        found = esft_experts(report, 0.2)
        assert {layer: [e for at, e in found if at == layer] for layer in shares} == {
            int(layer): experts for layer, experts in released.items()
        }

    def test_affinity_is_not_the_mean_over_tokens_there_either(
        self, traces: Traces, traced: list[RoutingStatistics], qwen: Checkpoint
    ) -> None:
        """Lengths differ by a factor of ten; the affinities of Eq. 2 come from the recorded gates by a plain loop."""
        report = report_of(functools.reduce(operator.add, traced), traces.shape, qwen)
        layer = 16
        expected, first = torch.zeros(64, dtype=torch.float64), 0
        for length in traces.lengths:
            for token in range(first, first + length):
                expected[traces.ids[layer][token]] += traces.gates[layer][token].double() / length / 40
            first += length
        (row,) = [row for row in report.layers if row.layer == layer]
        assert row.affinity == pytest.approx(expected.tolist(), abs=1e-6)
        token_mean = (
            torch.zeros(64).index_add(0, traces.ids[layer].flatten(), traces.gates[layer].flatten()) / 8251
        )
        assert (torch.tensor(row.affinity) - token_mean).abs().max() > 1e-3
