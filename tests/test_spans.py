"""Spans compose bit for bit, on every family; the cache keeps its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tasks import random_batch
from tiny import FAMILY_NAMES, VOCAB, save_tiny

from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.model.moe import MoEModel
from seuf_ray.model.spans import ConstantCache
from seuf_ray.passes import Batch
from seuf_ray.plugins import Reads


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_any_cut_gives_the_whole_models_bits(family: str, tmp_path: Path) -> None:
    """Three layers cut in two at 0, 1, 2 and 3, with padding; the last part ends with the norm, then the head."""
    model, batch = MoEModel(Checkpoint(save_tiny(tmp_path / "model", family))), random_batch()
    arguments = {"input_ids": batch.ids, "attention_mask": batch.attention.long(), "use_cache": False}
    with torch.no_grad():
        whole = model.module(**arguments).logits[batch.attention]
        for cut in range(4):
            hidden = model.spans.run(0, cut, model.spans.embed(batch.ids), batch.attention)
            hidden = model.spans.run(cut, 3, hidden, batch.attention)
            assert torch.equal(model.spans.head(hidden)[batch.attention], whole)


def test_a_pass_that_is_cut_short_routes_the_same_and_has_no_likelihood(tmp_path: Path) -> None:
    model, batch = MoEModel(Checkpoint(save_tiny(tmp_path / "model", "deepseek_v3"))), random_batch()
    with torch.no_grad():
        whole, short = model.forward(batch), model.forward(batch, reads=Reads(depth=2))
    assert sorted(short.router_logits) == [1] and sorted(whole.router_logits) == [1, 2]
    assert torch.equal(short.router_logits[1], whole.router_logits[1])
    assert short.logps.isnan().all() and short.nll().isnan()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_hidden_states_and_logits_are_there_where_they_are_read(family: str, tmp_path: Path) -> None:
    """hidden_states[i + 1] of transformers is what layer i puts out; its last one is normed, ours never."""
    model, batch = MoEModel(Checkpoint(save_tiny(tmp_path / "model", family))), random_batch()
    with torch.no_grad():
        plain = model.module(
            input_ids=batch.ids, attention_mask=batch.attention.long(), output_hidden_states=True
        )
        found = model.forward(batch, reads=Reads(hidden=frozenset({0, 1, 2}), logits=True))
        normed = model.module.get_submodule("model.norm")(found.hidden[2])
    for layer in (0, 1):
        assert torch.equal(found.hidden[layer], plain.hidden_states[layer + 1])
    assert torch.equal(normed, plain.hidden_states[3])
    assert found.logits is not None and torch.equal(found.logits, plain.logits[:, :-1])
    assert model.forward(batch).logits is None and model.forward(batch).hidden == {}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_packed_sequences_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    """Two sequences of 5 and 4 tokens in a row with one token of padding: what each makes alone, to rounding."""
    model = MoEModel(Checkpoint(save_tiny(tmp_path / "model", family)))
    ids = torch.randint(3, VOCAB, (1, 10), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[0] * 5 + [1] * 4 + [-1]])
    real = segments >= 0
    packed = Batch(ids, real, real, segments)
    assert packed.positions is not None and packed.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]]
    with torch.no_grad():
        logits, choices = model.route(packed)
        for part in (slice(0, 5), slice(5, 9)):
            everything = torch.ones_like(ids[:, part], dtype=torch.bool)
            alone, chosen = model.route(Batch(ids[:, part], everything, everything))
            for layer in model.shape.moe_layers:
                torch.testing.assert_close(logits[layer][part], alone[layer], rtol=1e-5, atol=1e-5)
                assert torch.equal(choices[layer][part].sort().values, chosen[layer].sort().values)


def test_routing_runs_nothing_after_the_last_router(tmp_path: Path) -> None:
    model, batch = MoEModel(Checkpoint(save_tiny(tmp_path / "model", "qwen3_moe"))), random_batch()
    called: list[int] = []
    for layer, site in model.sites.items():
        experts = site.block.get_submodule("experts")
        experts.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    with torch.no_grad():
        logits, _ = model.route(batch)
        whole = model.forward(batch)
    assert called == [0, 1, 0, 1, 2]
    assert all(torch.equal(logits[layer], whole.router_logits[layer]) for layer in model.shape.moe_layers)


def test_going_on_from_a_prefix_is_the_whole_pass(tmp_path: Path) -> None:
    model, batch = MoEModel(Checkpoint(save_tiny(tmp_path / "model", "qwen2_moe"))), random_batch()
    with torch.no_grad():
        whole, rest = model.forward(batch), model.forward(batch, prefix=model.prefix(batch, 2))
    assert torch.equal(whole.logps, rest.logps)
    assert sorted(rest.router_logits) == [0, 1, 2]  # the prefix remembers the routing of its layers


def test_the_cache_keeps_its_bounds_and_spills_the_rest(tmp_path: Path) -> None:
    """Tensors of 400 bytes: two fit into 1,000, the third goes to a file, and nothing is kept without a folder."""
    tensors = [{"hidden": torch.full((100,), float(i))} for i in range(3)]
    cache, bounded = ConstantCache(1000, tmp_path / "spill"), ConstantCache(1000)
    for key, value in enumerate(tensors):
        cache.put(key, value)
        bounded.put(key, value)
    cpu = torch.device("cpu")
    found = [cache.get(key, cpu) for key in range(3)]
    assert all(
        torch.equal(one["hidden"], value["hidden"]) for one, value in zip(found, tensors, strict=True) if one
    )
    assert cache.used == bounded.used == 800 and (cache.hits, cache.misses) == (3, 0)
    assert len(list((tmp_path / "spill").iterdir())) == 1
    assert bounded.get(2, cpu) is None and bounded.misses == 1


def test_ranks_agree_on_what_is_kept() -> None:
    """One rank's part would fit and the other's not: both must forget it, or one would wait for the other's calls."""
    cache = ConstantCache(500, agree=lambda size: 600)
    cache.put("batch", {"hidden": torch.zeros(10)})
    assert cache.get("batch", torch.device("cpu")) is None
