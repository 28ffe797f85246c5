"""What `--help` lists: every key as it is, plug-ins' read from their source without importing them."""

from __future__ import annotations

import pytest
from pydantic_core import PydanticUndefined

from seuf_ray import plugins
from seuf_ray.config import JobConfig
from seuf_ray.config.keys import REQUIRED, as_toml, keys_of, plugin_keys
from seuf_ray.paper.settings import PaperSettings


@pytest.mark.parametrize("section", ["algorithm", "anchor"])
def test_hyper_parameters_are_those_of_the_classes(section: str) -> None:
    listed = plugin_keys(section)
    for name in plugins.available(f"{section}s"):
        fields = plugins.find(f"{section}s", name).model_fields
        own = {key.path.removeprefix(f"{section}."): key for key in listed if name in key.owners}
        assert len(own) == sum(name in key.owners for key in listed)
        assert own.keys() == fields.keys() - {"name"}
        for field, key in own.items():
            default = fields[field].default
            assert key.default == (REQUIRED if default is PydanticUndefined else default), (name, field)
            assert key.description == fields[field].description
            assert all(choice in str(fields[field].annotation) for choice in key.choices)


def test_help_lists_plugins_rows_and_values_as_toml() -> None:
    lines = [str(key).splitlines()[0] for key in keys_of(JobConfig)]
    for line in (
        '  algorithm ["ga"]',
        "  algorithm.beta (npo) [0.1]",
        "  algorithm.steering_coefficient (rmu) [20.0]",
        "  algorithm.retain (",
        '  anchor.layers (kl) ["targets"] (targets | all)',
        "  compare[].name",
        "  resume [false]",
        "  cluster.address [unset]",
        '  data.forget ["embedded:chemistry"]',
    ):
        assert any(shown.startswith(line) for shown in lines), line
    assert len(lines) == len(set(lines))
    assert not [line for line in lines if "None" in line or "False" in line]


def test_the_papers_workers_are_cells() -> None:
    (key,) = (key for key in keys_of(PaperSettings) if key.path == "cluster.num_workers")
    assert (key.default, key.description) == (2, "cells that run at the same time")


def test_values_are_written_as_toml() -> None:
    assert as_toml({"rmu": 30, "on": [True, "a", 1.5, None]}) == '{rmu = 30, on = [true, "a", 1.5, unset]}'
