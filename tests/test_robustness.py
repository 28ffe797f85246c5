"""What is done to an unlearned model, with the arithmetic of rounding, and identities that forced routing must keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import ascend, make_plan, random_batch
from tiny import save_tiny

from seuf_ray import embedded
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import TrainingConfig
from seuf_ray.data.batches import collate
from seuf_ray.data.rows import Row
from seuf_ray.embedded.paraphrases import CLOZES, attribute_of, paraphrased
from seuf_ray.embedded.templates import TEMPLATES
from seuf_ray.engine import LocalEngine
from seuf_ray.model.moe import MoEModel
from seuf_ray.robustness import forced, is_inverted, plainly, quantised_experts, relearn, round_to_nearest


@pytest.fixture(scope="module", params=["qwen2_moe", "mixtral", "deepseek_v3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny(tmp_path_factory.mktemp(request.param) / "model", request.param))


def trained(checkpoint: Checkpoint, steps: int) -> MoEModel:
    """Plain weights after steps of ascent on two experts of MoE layers and their routers."""
    layers = checkpoint.shape.moe_layers
    plan = make_plan(checkpoint, [(layers[0], 1), (layers[-1], 5)])
    engine = LocalEngine(MoEModel(checkpoint), plan, TrainingConfig())
    for step in range(steps):
        ascend(engine, random_batch(seed=step))
    model = MoEModel(checkpoint)
    model.exchange(engine.tensors())
    return model


def test_rounding_is_to_the_nearest_of_15_values_of_each_output_channel() -> None:
    """4 bits: s = max / 7. Channel (7, -3.4, .4): s = 1 -> (7, -3, 0). Channel (.14, -.0501, .0099): s = .02, so
    .02 * round(7, -2.505, .495) = .02 * (7, -3, 0). A channel of zeros stays.
    """
    weight = torch.tensor([[7.0, -3.4, 0.4], [0.14, -0.0501, 0.0099], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[7.0, -3.0, 0.0], [0.14, -0.06, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_to_nearest(weight, 4), expected)


@given(st.integers(0, 1000), st.sampled_from([4, 8]))
def test_rounding_moves_a_weight_by_half_a_step_at_most_and_does_nothing_twice(seed: int, bits: int) -> None:
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_nearest(weight, bits)
    step = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((rounded - weight).abs() <= step / 2 * 1.0001).all()
    assert (rounded / step).round().unique().numel() <= 2**bits - 1
    torch.testing.assert_close(round_to_nearest(rounded, bits), rounded)


def test_experts_are_rounded_inside_only_and_nothing_else_is(checkpoint: Checkpoint) -> None:
    model = MoEModel(checkpoint)
    names = model.tensor_names()
    before = {name: model.view(name).clone() for name in names}
    with quantised_experts(model, 4):
        changed = {name for name in names if not torch.equal(model.view(name), before[name])}
    assert changed == {name for name in names if checkpoint.family.parse_expert(name)}
    assert all(torch.equal(model.view(name), before[name]) for name in names)


def test_forced_routing_changes_nothing_where_nothing_was_trained(checkpoint: Checkpoint) -> None:
    original, same, batch = MoEModel(checkpoint), trained(checkpoint, 0), random_batch()
    assert torch.equal(forced(original, same)(batch), plainly(original)(batch))


def test_with_forced_routing_the_unlearned_models_routers_have_no_say(checkpoint: Checkpoint) -> None:
    """Other routers, the same result, which is neither the original's nor the unlearned model's own."""
    original, unlearned, batch = MoEModel(checkpoint), trained(checkpoint, 4), random_batch()
    found = forced(original, unlearned)(batch)
    assert not torch.equal(found, plainly(unlearned)(batch)) and not torch.equal(
        found, plainly(original)(batch)
    )
    names = [checkpoint.family.router_tensor(layer) for layer in checkpoint.shape.moe_layers]
    unlearned.exchange({name: torch.randn_like(checkpoint.read(name)) for name in names})
    assert torch.equal(forced(original, unlearned)(batch), found)


def test_relearning_brings_the_rows_it_sees_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path / "model", "qwen2_moe"))
    model, rows = trained(checkpoint, 3), [Row((1, 5, 9, 13, 2)), Row((1, 7, 8, 2))]
    asked = collate(rows, 0)
    before = plainly(model)(asked).mean()
    engine = LocalEngine(model, make_plan(checkpoint, []), TrainingConfig())
    relearn(engine, rows, steps=10, learning_rate=1e-2, pad_id=0, seed=0)
    assert plainly(model)(asked).mean() > before + 1


def test_inversion_is_three_standard_errors_under_chance() -> None:
    """.25 - 3 sqrt(.25 * .75 / 100) = .25 - .1299 = .1201."""
    assert is_inverted(0.12, 100) and not is_inverted(0.13, 100) and not is_inverted(0.25, 100)


@pytest.mark.parametrize("domain", ["chemistry", "geography"])
def test_paraphrases_ask_for_the_same_facts_in_words_that_were_never_trained(domain: str) -> None:
    frozen, trained_on = embedded.questions(domain), embedded.texts(domain)
    for records in paraphrased(domain):
        assert [r["choices"] for r in records] == [r["choices"] for r in frozen]
        for record, old in zip(records, frozen, strict=True):
            attribute, subject = attribute_of(old["question"])
            assert subject.lower() in record["question"].lower() and record["question"] != old["question"]
            assert attribute in TEMPLATES
    starts = {record["question"] for records in paraphrased(domain) for record in records[::7]}
    assert not any(text.startswith(start) for start in starts for text in trained_on)


def test_wordings_are_no_training_templates() -> None:
    for attribute, clozes in CLOZES.items():
        cloze, *paraphrases = TEMPLATES[attribute]
        for wording in clozes:
            assert wording != cloze and not any(text.startswith(f"{wording} {{a}}") for text in paraphrases)


def test_a_domain_without_other_wordings_is_refused() -> None:
    with pytest.raises(ValueError, match="has no other wording"):
        paraphrased("nature")
