"""Plug-ins outside the package, beside the job file: found by the command line and by workers, and searched for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tasks import make_plan

from seuf_ray.artifacts import PatchManifest
from seuf_ray.checkpoint.folder import Checkpoint, resolve

ROOT = Path(__file__).resolve().parents[1]
ALGORITHM = """
from pydantic import Field
from seuf_ray.passes import Forward
from seuf_ray.plugins import Plugin


class HalfAscent(Plugin):
    name: str = "my_lab.half"
    share: float = Field(0.5, gt=0, le=1)

    def loss(self, forget: Forward):
        return {"forget": -self.share * forget.nll()}
"""
ANCHOR = """
from seuf_ray.passes import Forward, Targets
from seuf_ray.plugins import Plugin


class SquareAnchor(Plugin):
    name: str = "my_lab.square"
    weight: float = 1.0

    def loss(self, targets: Targets, forget: Forward, forget_ref: Forward):
        (layer,) = targets.routers
        change = forget.router_logits[layer] - forget_ref.router_logits[layer]
        return {"anchor": self.weight * forget.mean_routed(change.square().mean(dim=-1))}
"""
JOB = """
output_dir = "out"
[inputs]
plan = "plan.json"
[data]
max_rows = 64
[training]
steps = 2
evaluate_every = 2
max_questions = 8
batch_size = 8
[algorithm]
name = "my_lab.half"
share = 0.25
[anchor]
name = "my_lab.square"
"""


@pytest.mark.slow
def test_a_job_finds_plug_ins_in_the_folder_that_it_is_started_in(tmp_path: Path, ray_address: str) -> None:
    """Without PYTHONPATH: the driver reads the folder's own, and workers are told of it."""
    (tmp_path / "my_lab").mkdir()
    for name, text in {"my_lab/half.py": ALGORITHM, "my_lab/square.py": ANCHOR, "job.toml": JOB}.items():
        (tmp_path / name).write_text(text)
    make_plan(Checkpoint(resolve("embedded:specialised")), [(3, 17)]).write(tmp_path / "plan.json")
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "unlearn.py"), "job.toml"],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": ray_address, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = PatchManifest.read(tmp_path / "out" / "patch" / "manifest.json").config
    assert config["algorithm"] == {"name": "my_lab.half", "share": 0.25}
    assert config["anchor"]["name"] == "my_lab.square"
