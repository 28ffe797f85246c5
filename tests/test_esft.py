"""ESFT's JSON and rule; the golden configurations are in test_attribution."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import records

from seuf_ray import embedded
from seuf_ray.attribution.esft import esft_experts, read_experts, write_experts
from seuf_ray.attribution.selection import explicit_experts
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import TargetsConfig, validate
from seuf_ray.errors import ConfigError
from seuf_ray.job import Job


def report(*rows: list[float]) -> object:
    layers = [
        records.attribution(1).layers[0].model_copy(update={"layer": i + 1, "affinity": row})
        for i, row in enumerate(rows)
    ]
    return records.attribution(1).model_copy(update={"layers": layers})


def test_the_rule_takes_experts_until_their_share_is_reached() -> None:
    """Layer 1: .5 + .3 = .8 of 1.0 reaches .6 with two; layer 2 sums to 2: .6 of it is 1.2, so 1.0 and .6; ties go to
    the lower index.
    """
    found = esft_experts(report([0.1, 0.5, 0.3, 0.1], [0.6, 1.0, 0.2, 0.2]), 0.6)
    assert found == [(1, 1), (1, 2), (2, 1), (2, 0)]
    assert esft_experts(report([0.25] * 4), 0.5) == [(1, 0), (1, 1)]
    assert esft_experts(report([0.1, 0.9, 0.0, 0.0]), 0.0) == [(1, 1)]  # never none


def test_what_is_written_is_read(tmp_path: Path) -> None:
    experts = [(1, 5), (1, 2), (12, 0)]
    path = write_experts(tmp_path / "config.json", experts)
    assert read_experts(path) == experts
    assert json.loads(path.read_text()) == {
        "experts": {"1": [5, 2], "12": [0]},
        "shared_experts": False,
        "non_expert_modules": False,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not an ESFT expert configuration"),
        ("[]", "not an ESFT expert configuration"),
        ('{"experts": {"one": [1]}}', "not an ESFT expert configuration"),
        ('{"experts": {"1": 3}}', "not an ESFT expert configuration"),
        ('{"experts": {"1": [3]}, "shared_experts": true}', "shared_experts = true is not supported"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_experts(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="no such file"):
        read_experts(tmp_path / "other.json")


def test_a_plan_can_take_its_experts_from_such_a_file(tmp_path: Path) -> None:
    """The key takes pairs or a path; a job with an expert that the model does not have is refused when it is made."""
    path = write_experts(tmp_path / "config.json", [(3, 5), (1, 2)])
    shape = Checkpoint(embedded.checkpoint("specialised")).shape
    targets = TargetsConfig.model_validate({"scope": "explicit", "experts": str(path)})
    assert explicit_experts(targets, shape) == [(1, 2), (3, 5)]
    write_experts(path, [(4, 0)])
    config = validate({"output_dir": str(tmp_path / "out"), "targets": targets.model_dump(mode="json")})
    with pytest.raises(
        ConfigError, match=r"targets.experts: \[4, 0\] is not in this model; layers 0-3 have experts 0-31"
    ):
        Job(config)
