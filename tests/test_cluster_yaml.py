"""cluster.yaml and jobs/runtime_env.yaml, offline: Ray's own schema, the EC2 API's, versions and shell syntax."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import ray
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from seuf_ray.config import validate
from seuf_ray.errors import ConfigError
from seuf_ray.stages import resources
from seuf_ray.stages.data import require_room
from seuf_ray.stages.session import require

ROOT = Path(__file__).resolve().parent.parent
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
NODE_TYPES: dict[str, Any] = CLUSTER["available_node_types"]
RUN_INSTANCES = (
    botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _commands() -> list[str]:
    return [line for key, lines in CLUSTER.items() if key.endswith("_commands") for line in lines]


def test_ray_accepts_the_file() -> None:
    validate_config(prepare_config(copy.deepcopy(CLUSTER)))


def test_ray_would_notice_a_misspelt_key() -> None:
    broken = {**copy.deepcopy(CLUSTER), "max_wokers": 1}
    with pytest.raises(Exception, match="max_wokers"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", NODE_TYPES)
def test_ec2_accepts_the_node(name: str) -> None:
    request = {**NODE_TYPES[name]["node_config"], "MinCount": 1, "MaxCount": 1}
    assert ParamValidator().validate(request, RUN_INSTANCES).generate_report() == ""
    assert request["InstanceType"] in RUN_INSTANCES.members["InstanceType"].enum


def test_nothing_is_rented_before_it_is_asked_for() -> None:
    head = NODE_TYPES[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0}  # no training process may land on the head
    workers = {name: node for name, node in NODE_TYPES.items() if name != CLUSTER["head_node_type"]}
    assert [node["min_workers"] for node in workers.values()] == [0] * len(workers)
    assert all(0 < node["max_workers"] <= CLUSTER["max_workers"] for node in workers.values())


def test_versions_are_pinned_to_the_tested_ones() -> None:
    images = [text for text in _strings(CLUSTER) if text.startswith("rayproject/")]
    assert images and all(image.split(":")[1].startswith(f"{ray.__version__}-py311") for image in images)
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalpha()
    )
    assert pins["ray"] == ray.__version__
    assert any(f"]=={ray.__version__}" in command for command in _commands())
    assert any(f"torch=={pins['torch']}" in command for command in _commands())


def test_every_scope_and_searcher_finds_its_packages() -> None:
    """targets.scope = lora needs peft, jobs/search_demo.toml optuna."""
    (install,) = (shlex.split(command) for command in _commands() if "constraints.txt" in command)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for needed in (*extras["lora"], *extras["search"]):
        assert re.split(r"[\[<>=]", needed)[0] in install


def test_commands_are_shell() -> None:
    assert _commands()
    for command in _commands():
        assert shlex.split(command), command


def test_the_head_scales_and_every_process_needs_the_token() -> None:
    starts = [line for line in CLUSTER["head_start_ray_commands"] if "ray start" in line]
    assert starts and all("--autoscaling-config=~/ray_bootstrap_config.yaml" in line for line in starts)
    assert all("$RAY_HEAD_IP" in line for line in CLUSTER["worker_start_ray_commands"] if "ray start" in line)
    options = " ".join(CLUSTER["docker"]["run_options"])
    token = options.split("RAY_AUTH_TOKEN_PATH=")[1].split()[0]
    assert "RAY_AUTH_MODE=token" in options and token in CLUSTER["file_mounts"]


def test_a_job_is_not_refused_for_what_the_cluster_does_not_have_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its session, nor its actors, nor what it will need: a task asks for a worker's node first."""
    head = {"Alive": True, "Resources": {"memory": 2.0**35}}
    worker = {"Alive": True, "Resources": {"memory": 2.0**36, "CPU": 8.0}}
    there = [head]
    monkeypatch.delenv("RAY_CLUSTER_AUTOSCALES", raising=False)
    monkeypatch.setattr(ray, "nodes", lambda: there)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(resources, "_on_a_worker", lambda *_: there.append(worker) or 0)
    job = validate({"output_dir": "x"})
    with pytest.raises(ConfigError, match="RAY_CLUSTER_AUTOSCALES=1"):
        require(job.cluster)
    monkeypatch.setenv("RAY_CLUSTER_AUTOSCALES", "1")
    require(job.cluster)
    require_room("attribution.num_actors", 2, job.cluster)
    found = resources.at_hand(job)
    assert found.share(1, job.cluster).host == 2**36


def test_runtime_env() -> None:
    document = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    assert document["working_dir"] == "."
    assert {".venv/", "runs/"} <= set(document["excludes"])
    assert all(isinstance(value, str) for value in document["env_vars"].values())
    RuntimeEnv(
        env_vars=document["env_vars"], excludes=document["excludes"]
    )  # raises for keys Ray does not know
    # The head offers no CPU, so what is there when a job comes says nothing of what it can have.
    assert document["env_vars"]["RAY_CLUSTER_AUTOSCALES"] == "1"
    assert not set(document) - {
        "working_dir",
        "excludes",
        "env_vars",
    }  # packages are installed when a node starts
