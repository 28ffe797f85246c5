"""What stages hand over, and which models and plug-ins are known (what a job file may say: test_config.py)."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from seuf_ray import artifacts, config, families, plugins
from seuf_ray.artifacts import (
    AttributionReport,
    DataSummary,
    LayerScores,
    ModelIdentity,
    Provenance,
    UnlearningPlan,
)
from seuf_ray.errors import ConfigError, MismatchError

# -- plug-ins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["algorithms", "anchors"])
def test_every_shipped_plugin_is_named_like_its_file(kind: str) -> None:
    assert plugins.available(kind)
    for name in plugins.available(kind):
        made = plugins.find(kind, name)()
        assert made.name == name
        assert all(field.description for key, field in type(made).model_fields.items() if key != "name")


def test_a_plugin_may_live_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab").mkdir()
    source = "from seuf_ray.plugins import Plugin\nclass Mine(Plugin):\n    strength: float = 1.0\n"
    (tmp_path / "my_lab" / "mine.py").write_text(source)
    (tmp_path / "my_lab" / "two.py").write_text(source + "class Other(Plugin): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = plugins.find("algorithms", "my_lab.mine")
    assert found.__name__ == "Mine"
    made = config.validate({"output_dir": "x", "algorithm": {"name": "my_lab.mine", "strength": 2}})
    assert made.algorithm.model_dump() == {"name": "my_lab.mine", "strength": 2.0}
    with pytest.raises(ConfigError, match="exactly one plug-in class, found 2"):
        plugins.find("algorithms", "my_lab.two")


def test_words_weigh_nothing() -> None:
    program = (
        "import sys, seuf_ray.config, seuf_ray.artifacts, seuf_ray.families\n"
        "print(sorted({'torch', 'ray', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# -- artifacts ---------------------------------------------------------------------------------------------------


def _identity(name: str = "tiny", digest: str = "ab" * 32) -> ModelIdentity:
    return ModelIdentity(
        name=name, revision=None, model_type="qwen2_moe", num_parameters=10, fingerprint=digest
    )


def _report(scores: list[list[float]]) -> AttributionReport:
    return AttributionReport(
        model=_identity(),
        provenance=Provenance(seed=3, made_from={}, packages={}),
        score="affinity",
        num_experts=len(scores[0]),
        top_k=2,
        data=DataSummary(sources=["é"], num_texts=1, num_rows=1, num_tokens=5),
        digest="0" * 64,
        layers=[
            LayerScores(layer=layer, affinity=row, router_score=row, token_share=row)
            for layer, row in enumerate(scores)
        ],
        warnings=[],
    )


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_an_artifact_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, scores: list[list[float]]
) -> None:
    report = _report(scores)
    path = tmp_path_factory.mktemp("artifact") / "deep" / "report.json"
    assert report.write(path) == path
    again = AttributionReport.read(path)
    assert again == report and again.fingerprint == report.fingerprint
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]  # nothing left aside


def test_an_edited_artifact_is_refused(tmp_path: Path) -> None:
    path = _report([[0.1, 0.7, 0.2]]).write(tmp_path / "report.json")
    path.write_text(path.read_text().replace("0.7", "0.8"))
    with pytest.raises(MismatchError, match=r"report\.json: content .* differs from its fingerprint"):
        AttributionReport.read(path)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(ConfigError, match="no such file; run the stage that makes it first"):
        AttributionReport.read(path)
    with pytest.raises(ConfigError, match="cannot be read as a AttributionReport: Is a directory"):
        AttributionReport.read(tmp_path)
    for text, why in (
        ("", "Expecting value"),
        ("[]", "no key 'fingerprint'"),
        ("{}", "no key 'fingerprint'"),
        ('{"fingerprint": "x"}', r"\d+ validation errors"),
        ("3", "'int'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"not a AttributionReport: {why}"):
            AttributionReport.read(path)
    _report([[0.1, 0.2]]).write(path)
    with pytest.raises(ConfigError, match="UnlearningPlan"):
        UnlearningPlan.read(path)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert artifacts.fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == artifacts.fingerprint(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert artifacts.fingerprint({"a": 1}) != artifacts.fingerprint({"a": 2})
    assert artifacts.fingerprint({"a": [1, 2]}) != artifacts.fingerprint({"a": [2, 1]})


def test_an_artifact_knows_its_model(tmp_path: Path) -> None:
    report = _report([[0.5, 0.5]])
    report.require_model(_identity("another name, same weights"), tmp_path)
    with pytest.raises(MismatchError, match="'tiny'.*'other'"):
        report.require_model(_identity("other", "cd" * 32), tmp_path)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=4, max_size=4), min_size=1, max_size=4))
def test_ranked_is_a_total_order(scores: list[list[float]]) -> None:
    ranked = _report(scores).ranked()
    assert sorted(expert for _, expert in ranked) == [(la, e) for la in range(len(scores)) for e in range(4)]
    for (first, at), (second, then) in itertools.pairwise(ranked):
        assert first > second or (first == second and at < then)


def test_provenance_names_the_versions() -> None:
    made = artifacts.provenance(3, plan="f" * 64)
    assert made.made_from == {"plan": "f" * 64} and made.seed == 3
    assert {"seuf-ray", "torch", "ray", "transformers", "deepspeed"} <= set(made.packages)


def test_schemas_are_printed() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "seuf_ray.artifacts"], capture_output=True, text=True, check=True
    )
    assert {"AttributionReport", "UnlearningPlan", "PatchManifest", "EvaluationReport"} <= set(
        json.loads(result.stdout)
    )


# -- families ----------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_hidden_layers": 6,
        "num_experts": 12,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "qwen3_moe": {"num_hidden_layers": 4, "num_experts": 16, "mlp_only_layers": [0]},
    "olmoe": {"num_hidden_layers": 3, "num_experts": 8},
    "deepseek_v2": {"num_hidden_layers": 5, "n_routed_experts": 10, "first_k_dense_replace": 1},
    "deepseek_v3": {"num_hidden_layers": 5, "n_routed_experts": 16, "first_k_dense_replace": 3},
    "mixtral": {"num_hidden_layers": 3, "num_local_experts": 4},
}


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_shape_agrees_with_transformers(model_type: str) -> None:
    """The layers that transformers builds with experts, how many, and the top-k; on meta, so nothing is computed."""
    import torch
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    if model_type == "deepseek_v3":
        sizes |= {"n_group": 4, "topk_group": 2}
    made = AutoConfig.for_model(model_type, **sizes, **MODELS[model_type])
    shape = families.shape_of(json.loads(made.to_json_string()))
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(made).model.layers
    built = {index: layer.mlp.experts for index, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}
    assert shape.moe_layers == tuple(built)
    assert shape.num_layers == len(layers) and shape.top_k == made.num_experts_per_tok
    assert {experts.down_proj.shape[0] for experts in built.values()} == {shape.num_experts}
    assert shape.scoring == ("sigmoid" if model_type == "deepseek_v3" else "softmax")


def test_dense_and_unknown_models_are_refused() -> None:
    dense = json.loads(AutoConfig.for_model("llama").to_json_string())
    with pytest.raises(ConfigError, match="'llama' is not a mixture-of-experts model"):
        families.shape_of(dense)
    with pytest.raises(ConfigError, match="unknown MoE family.*did you mean 'qwen3_moe'"):
        families.shape_of({"model_type": "qwen3_moee", "num_experts": 8})
    with pytest.raises(ConfigError, match="no layer with routed experts"):
        families.shape_of({"model_type": "deepseek_v2", "num_hidden_layers": 2, "first_k_dense_replace": 2,
                           "n_routed_experts": 8, "num_experts_per_tok": 2})  # fmt: skip


@given(
    family=st.sampled_from(list(families.FAMILIES.values())),
    layer=st.integers(0, 99),
    expert=st.integers(0, 511),
    part=st.sampled_from(families.PARTS),
)
def test_expert_names_are_read_as_they_are_written(
    family: families.Family, layer: int, expert: int, part: families.Part
) -> None:
    assert family.parse_expert(family.expert_tensor(layer, expert, part)) == (layer, expert, part)
    assert family.parse_expert(family.router_tensor(layer)) is None
    assert family.parse_expert(f"model.layers.{layer}.{family.block}.shared_experts.gate_proj.weight") is None
