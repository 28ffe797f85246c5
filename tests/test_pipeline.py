"""The stages on one real local Ray: attribution, training with two workers, patch, evaluation, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_boards import shown
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from seuf_ray import patch
from seuf_ray.artifacts import AttributionReport, EvaluationReport, PatchManifest, UnlearningPlan
from seuf_ray.checkpoint.folder import Checkpoint, resolve
from seuf_ray.config import JobConfig, derive, validate
from seuf_ray.errors import ConfigError, MismatchError
from seuf_ray.job import Job, prepare
from seuf_ray.model.moe import MoEModel
from seuf_ray.outputs import EVERYTHING, claim, read_metrics
from seuf_ray.report import write_report
from seuf_ray.stages.attribute import attribute
from seuf_ray.stages.compare import compare
from seuf_ray.stages.evaluate import evaluate
from seuf_ray.stages.plan import plan
from seuf_ray.stages.session import require, session
from seuf_ray.stages.unlearn import unlearn
from seuf_ray.unlearning import Progress

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("ray_session")]


def make_config(folder: Path, **more: Any) -> JobConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "data": {"max_rows": 160},
        "attribution": {"unit_rows": 16},
        "training": {"steps": 4, "evaluate_every": 2, "max_questions": 20, "learning_rate": 1e-2},
        "evaluation": {"max_questions": 24, "max_texts": 32, "unit_rows": 32},
        "cluster": {"cpus_per_worker": 0.5},
    }
    return validate(values | more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Job, list[Progress]]:
    """One whole run with two expert-parallel workers, as the demo does it."""
    config = make_config(
        tmp_path_factory.mktemp("run") / "out",
        cluster={"num_workers": 2, "expert_parallel_size": 2, "cpus_per_worker": 0.5},
    )
    job, seen = prepare(config), []
    claim(config, *EVERYTHING)
    with session(config.cluster):
        targets = plan(job, attribute(job))
        folder = unlearn(job, targets, seen.append)
        evaluate(job)
        evaluate(job, folder)
    return job, seen


@pytest.fixture(scope="module")
def artifacts(finished: tuple[Job, list[Progress]]) -> dict[str, Any]:
    job, _ = finished
    return {
        "attribution": AttributionReport.read(job.path("attribution.json")),
        "plan": UnlearningPlan.read(job.path("plan.json")),
        "patch": PatchManifest.read(job.path("patch/manifest.json")),
        "before": EvaluationReport.read(job.path("evaluation_before.json")),
        "after": EvaluationReport.read(job.path("evaluation_after.json")),
    }


def test_every_artifact_names_what_it_was_made_from(artifacts: dict[str, Any]) -> None:
    made_from = {name: artifact.provenance.made_from for name, artifact in artifacts.items()}
    assert made_from["plan"]["attribution"] == artifacts["attribution"].fingerprint
    assert made_from["patch"]["plan"] == artifacts["plan"].fingerprint
    assert made_from["after"]["patch"] == artifacts["patch"].fingerprint == artifacts["after"].patch
    assert {artifact.model.fingerprint for artifact in artifacts.values()} == {
        artifacts["plan"].model.fingerprint
    }


def test_progress_reaches_the_driver_and_metrics_jsonl(finished: tuple[Job, list[Progress]]) -> None:
    job, seen = finished
    assert [progress.step for progress in seen] == [0, 2, 4]
    written = read_metrics(job)
    assert [record["step"] for record in written] == [0, 2, 4]
    assert written[-1]["loss/forget"] == seen[-1].metrics["loss/forget"]
    layers = job.checkpoint.shape.moe_layers
    for name in ("loss/anchor", "loss/total", "grad_norm", "forget_accuracy", "utility", "seconds"):
        assert name in written[-1]
    for figure in ("overlap_top1", "overlap_topk", "kl"):
        assert all(f"{figure}/{side}/{at}" in written[-1] for side in ("forget", "retain") for at in layers)
    (target,) = UnlearningPlan.read(job.path("plan.json")).routers
    for figure in ("overlap_top1", "overlap_topk", "kl", "target_tokens", "target_tokens_ref"):
        assert f"step/{figure}/{target}" in written[-1]
    points = shown(job.path("tensorboard"))
    assert points.keys() == {name for record in written for name in record} - {"step", "kept"}
    assert [step for step, _ in points["utility"]] == [0, 2, 4]


def test_the_original_does_not_drift_and_the_patch_does(artifacts: dict[str, Any]) -> None:
    before, after = artifacts["before"], artifacts["after"]
    assert before.drift("overlap_topk", "forget") == 1.0 and before.drift("kl", "forget") == 0.0
    assert after.drift("kl", "forget") > 0.0 and after.drift("overlap_topk", "forget") < 1.0
    assert sum(s.count for s in after.forget.values()) == 24


def test_diff_lists_exactly_the_plans_tensors(
    artifacts: dict[str, Any], finished: Any, tmp_path: Path
) -> None:
    job, _ = finished
    patch.apply(job.checkpoint.folder, job.path("patch"), tmp_path / "patched")
    differences = patch.diff(job.checkpoint.folder, tmp_path / "patched")
    assert sorted(d.name for d in differences) == artifacts["plan"].tensors


def test_the_patched_folder_is_the_trained_model_in_plain_transformers(finished: Any, tmp_path: Path) -> None:
    job, _ = finished
    patch.apply(job.checkpoint.folder, job.path("patch"), tmp_path / "patched")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "patched")(
        "The symbol of gold is", return_tensors="pt"
    ).input_ids
    trained = MoEModel(job.checkpoint)
    trained.exchange(patch.read(job.path("patch"))[1])
    with torch.no_grad():
        found, expected = plain(input_ids=ids).logits, trained.module(input_ids=ids).logits
        original = MoEModel(job.checkpoint).module(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - original).abs().max() > 1e-3


def test_one_worker_trains_the_same_patch_as_two(
    finished: Any, artifacts: dict[str, Any], tmp_path: Path
) -> None:
    """In float32, and before rounding to the checkpoint's bfloat16 the difference is about 1e-6."""
    job, _ = finished
    alone = ["cluster.num_workers=1", "cluster.expert_parallel_size=1", f"output_dir={str(tmp_path)!r}"]
    other = Job(derive(job.config, alone))
    _, one = patch.read(unlearn(other, artifacts["plan"]))
    _, two = patch.read(job.path("patch"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name].float(), tensor.float(), atol=1e-4, rtol=2**-7)


def test_resume_keeps_what_is_finished(finished: Any, artifacts: dict[str, Any]) -> None:
    job, _ = finished
    again = Job(derive(job.config, ["resume=true"]))
    claim(again.config, *EVERYTHING)
    stamp = job.path("patch/patch.safetensors").stat().st_mtime_ns
    assert attribute(again).fingerprint == artifacts["attribution"].fingerprint
    assert unlearn(again, artifacts["plan"]) == job.path("patch")
    assert evaluate(again, job.path("patch")).fingerprint == artifacts["after"].fingerprint
    assert job.path("patch/patch.safetensors").stat().st_mtime_ns == stamp


def test_output_of_another_run_is_not_touched(finished: Any) -> None:
    job, _ = finished
    before = {path: path.stat().st_mtime_ns for path in job.config.output_dir.rglob("*") if path.is_file()}
    for overrides, said in (
        ([], "resume=true"),
        (["seed=1"], "another run"),
        (["seed=1", "resume=true"], "another run"),
    ):
        with pytest.raises(ConfigError, match=said):
            claim(derive(job.config, overrides), *EVERYTHING)
    assert before == {
        path: path.stat().st_mtime_ns for path in job.config.output_dir.rglob("*") if path.is_file()
    }


def test_a_plan_for_another_model_is_refused(finished: Any, tmp_path: Path) -> None:
    job, _ = finished
    plan_file = str(job.path("plan.json"))
    other = make_config(tmp_path, model={"name": "embedded:unspecialised"}, inputs={"plan": plan_file})
    with pytest.raises(MismatchError, match=r"embedded:specialised.*embedded:unspecialised"):
        plan(Job(other), write=False)
    assert not list(tmp_path.iterdir())


def test_a_patch_is_refused_by_another_base(finished: Any, tmp_path: Path) -> None:
    job, _ = finished
    with pytest.raises(MismatchError):
        patch.apply(resolve("embedded:unspecialised"), job.path("patch"), tmp_path / "out")
    with pytest.raises(MismatchError, match="unspecialised"):
        evaluate(
            Job(make_config(tmp_path / "run", model={"name": "embedded:unspecialised"})), job.path("patch")
        )
    assert not (tmp_path / "out").exists()


def test_compare_and_report(finished: Any, artifacts: dict[str, Any]) -> None:
    job, _ = finished
    variant = {
        "name": "full GA",
        "overrides": [
            "targets.scope=full",
            "anchor.name=none",
            "cluster.num_workers=1",
            "cluster.expert_parallel_size=1",
            "training.learning_rate=3e-4",
        ],
    }
    other = Job(derive(job.config, [f"compare={json.dumps([variant]).replace(': ', ' = ')}"]))
    table = compare(other, artifacts["attribution"], artifacts["before"])
    assert [row.name for row in table.rows] == ["original", "this job", "full GA"]
    assert table.rows[2].trainable_fraction == 1.0 and table.rows[1].trainable_fraction < 0.01
    page = write_report(
        job.path("report.html"),
        artifacts["attribution"],
        artifacts["plan"],
        read_metrics(job),
        artifacts["before"],
        artifacts["after"],
        table,
    )
    assert "full GA" in page.read_text()


def test_a_request_that_cannot_be_placed_is_an_error_with_numbers(tmp_path: Path) -> None:
    config = make_config(tmp_path, cluster={"num_workers": 64, "cpus_per_worker": 1.0})
    with pytest.raises(ConfigError, match=r"num_workers = 64 needs 64 CPU .* has 4"):
        require(config.cluster)
    crowd = Job(make_config(tmp_path, attribution={"num_actors": 40}))
    with pytest.raises(
        ConfigError, match=r"num_actors = 40 with 0.5 CPU each .* need 21 CPU, the Ray cluster has 4"
    ):
        attribute(crowd)


def test_a_sharded_checkpoint_of_your_own_goes_through(tmp_path: Path) -> None:
    """DeepSeek-V3's routing (sigmoid, groups, dense first layer) with the embedded tokenizer beside it."""
    folder = save_tiny(tmp_path / "model", "deepseek_v3")
    config_file = folder / "config.json"
    config_file.write_text(config_file.read_text().replace('"vocab_size": 64', '"vocab_size": 64'))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((resolve("embedded:specialised") / name).read_bytes())
    job = Job(make_config(tmp_path / "out", model={"name": str(folder)}))
    assert job.checkpoint.shape.moe_layers == (1, 2)
    assert Checkpoint(folder).shape.scoring == "sigmoid"
