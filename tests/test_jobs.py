"""The command line, and bad input: a clear message before any training, and nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from seuf_ray.checkpoint.folder import resolve
from seuf_ray.command import command
from seuf_ray.config import load, validate
from seuf_ray.errors import ConfigError
from seuf_ray.job import prepare, prepare_attribution
from seuf_ray.outputs import EVERYTHING, claim

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("job", JOBS)
def test_help_lists_every_key_and_imports_nothing_heavy(job: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['jobs/{job}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('jobs/{job}.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy or stop.code else 0)\n"
    )
    done = run_job("-c", code)
    assert done.returncode == 0, done.stderr
    own = (
        ("methods", "rate_factors") if job == "paper_tables" else ("training.learning_rate", "targets.scope")
    )
    for key in ("output_dir", "cluster.num_workers", *own):
        assert f"  {key}" in done.stdout, key


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.name=npoo"], "algorithm"),
        (["anchor.weight=-1"], "anchor.weight"),
        (["trainin.steps=3"], "did you mean 'training'"),
        (["training.steps"], "dotted.path=value"),
    ],
)
def test_mistakes_in_the_job_file_are_one_message_and_no_traceback(
    overrides: list[str], said: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run_job("jobs/pipeline.py", "jobs/demo.toml", f"output_dir={str(out)!r}", *overrides)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: FILE.toml\n"),
        (["jobs/demo.toml", "seed=1", "--training.steps=3"], "write training.steps=3, without dashes"),
        (["jobs/demo.toml", "--seed", "3"], "write seed=value, without dashes"),
    ],
)
def test_mistakes_in_the_command_say_what_to_write(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command("a job", arguments)
    assert said in capsys.readouterr().err


def test_the_demo_is_valid_and_complete() -> None:
    config = load(ROOT / "jobs" / "demo.toml")
    assert config.cluster.num_workers == config.cluster.expert_parallel_size == 2
    assert (
        config.training.stop_at_forget_accuracy is None
    )  # a fixed number of steps for every row of the table
    assert len(config.compare) >= 2


def _prepare(tmp_path: Path, **values: Any) -> None:
    config = validate({"output_dir": str(tmp_path / "out"), "data": {"max_rows": 20}} | values)
    prepare(config)


def _refused(tmp_path: Path, said: str, **values: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        _prepare(tmp_path, **values)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    _refused(tmp_path, r"nowhere\.jsonl", data={"forget": "data/nowhere.jsonl"})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("data.forget", {"data": {"forget": "SOURCE"}}),
        ("data.retain", {"data": {"retain": "SOURCE"}}),
        ("evaluation.forget", {"evaluation": {"forget": "SOURCE"}}),
        ("evaluation.utility", {"evaluation": {"utility": "SOURCE"}}),
        ("evaluation.perplexity", {"evaluation": {"perplexity": "SOURCE"}}),
    ],
)
def test_the_key_that_names_a_bad_source_is_said(tmp_path: Path, key: str, values: dict[str, Any]) -> None:
    ((section, names),) = values.items()
    missing = {section: {name: str(tmp_path / "none.jsonl") for name in names}}
    _refused(tmp_path, rf"^{key}: .*none\.jsonl", **missing)


def test_a_forget_set_that_holds_no_questions_says_where_questions_go(tmp_path: Path) -> None:
    own = tmp_path / "t.jsonl"
    own.write_text('{"text": "gold is Au, and iron is Fe"}\n')
    said = r"^data\.forget: .*t\.jsonl:1: a question needs .* evaluation\.forget is not set, so data\.forget is read"
    _refused(tmp_path, said, data={"forget": str(own)})


def test_attribution_alone_names_the_key_too(tmp_path: Path) -> None:
    data = {"retain": str(tmp_path / "none.jsonl")}
    with pytest.raises(ConfigError, match=r"^data\.retain: .*none\.jsonl"):
        prepare_attribution(validate({"output_dir": str(tmp_path / "out"), "data": data}))


def test_an_empty_forget_file_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    _refused(tmp_path, r"empty\.jsonl", data={"forget": str(empty)})


def test_a_broken_line_is_named_with_its_number(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "gold is Au"}\n{"text": "iron is\n')
    _refused(tmp_path, r"broken\.jsonl:2", data={"forget": str(broken)})


def test_text_that_tokenises_to_nothing_is_refused(tmp_path: Path) -> None:
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": "   "}\n')
    _refused(tmp_path, "blank", data={"forget": str(blank)})


def test_too_many_targets_are_refused_before_attribution(tmp_path: Path) -> None:
    _refused(tmp_path, r"targets\.top_m = 33.*32 experts", targets={"scope": "layer", "top_m": 33})


def test_experts_must_divide_over_the_ranks(tmp_path: Path) -> None:
    _refused(tmp_path, "must divide", cluster={"num_workers": 3, "expert_parallel_size": 3})


def test_the_full_baseline_is_not_expert_parallel(tmp_path: Path) -> None:
    parallel = {"num_workers": 2, "expert_parallel_size": 2}
    _refused(tmp_path, "expert_parallel_size = 1", targets={"scope": "full"}, cluster=parallel)


@pytest.mark.parametrize("key", ["attribution", "plan", "patch"])
def test_inputs_that_are_not_there_are_refused_before_attribution(tmp_path: Path, key: str) -> None:
    _refused(tmp_path, rf"^inputs\.{key}: .*none.*: no such file", inputs={key: str(tmp_path / "none")})
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    _refused(tmp_path, rf"^inputs\.{key}: .*Is a directory", inputs={key: str(tmp_path / "folder")})


def test_the_pipeline_evaluates_nobody_elses_patch(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_job(
        "jobs/pipeline.py", "jobs/demo.toml", f"output_dir={str(out)!r}", "inputs.patch=some/patch"
    )
    assert done.returncode == 1 and "inputs.patch: the pipeline trains a patch of its own" in done.stderr
    assert not out.exists()


def test_lora_without_peft_is_refused_before_a_worker_misses_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    lora = {"targets": {"scope": "lora"}, "anchor": "none"}
    _refused(tmp_path, r"targets\.scope = 'lora'.*pip install 'seuf-ray\[lora\]'", **lora)
    _prepare(tmp_path)


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    _refused(
        tmp_path,
        r"engine\.cache_dir .* cannot be written",
        engine={"cache_dir": str(tmp_path / "file" / "x")},
    )
    with pytest.raises(ConfigError, match=r"output_dir .* cannot be written"):
        prepare(validate({"output_dir": str(tmp_path / "file" / "out")}))


def test_more_ranks_than_experts_are_refused(tmp_path: Path) -> None:
    _refused(tmp_path, "must divide", cluster={"num_workers": 64, "expert_parallel_size": 64})


def test_an_unknown_family_says_which_are_known_and_how_to_add_one(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "jetmoe", "num_local_experts": 8}')
    (folder / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    _refused(tmp_path, r"unknown MoE family.*qwen2_moe.*row in families\.py", model={"name": str(folder)})


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    _refused(tmp_path, "not a mixture-of-experts model", model={"name": str(tmp_path / "dense")})


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["targets.scope=everything"], "scope"),
        (["targets.scope=lora", "anchor.name=none"], "cluster.expert_parallel_size = 1"),
        (
            ["targets.scope=experts", "anchor.name=onehot", "cluster.expert_parallel_size=1"],
            "anchor.name = 'onehot'",
        ),
        (["model.name=/nowhere"], "a row shares the job's model.*'/nowhere'"),
        (["model.name=embedded:unspecialised"], "a row shares the job's model.*'embedded:unspecialised'"),
        (["model.revision=abc"], "a row shares the job's model, model.revision = None .*'abc'"),
    ],
)
def test_a_bad_variant_is_refused_at_once(tmp_path: Path, overrides: list[str], why: str) -> None:
    """Also what only the model can tell, which the job's own training would have come before."""
    _refused(
        tmp_path,
        f"compare 'bad': .*{why}",
        compare=[{"name": "bad", "overrides": overrides}],
        cluster={"num_workers": 2, "expert_parallel_size": 2},
    )


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("two years of work")
    config = validate({"output_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="another run"):
        claim(config, *EVERYTHING)
    claim(validate({"output_dir": str(tmp_path), "overwrite": True}), *EVERYTHING)
    assert (tmp_path / "thesis.txt").read_text() == "two years of work"


def test_patch_help_and_a_missing_patch(tmp_path: Path) -> None:
    done = run_job("-m", "seuf_ray.patch", "verify", str(resolve("embedded:specialised")), str(tmp_path))
    assert done.returncode == 1 and "manifest.json" in done.stderr and "Traceback" not in done.stderr
