"""What a job file may say, and how a mistake in it is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seuf_ray import config
from seuf_ray.config import JobConfig
from seuf_ray.errors import ConfigError


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text('output_dir = "runs/x"\n[algorithm]\nname = "gdiff"\nretain_weight = 0.5\n')
    return path


def _refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    return str(caught.value)


def test_an_empty_job_only_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("")
    assert _refused(tmp_path / "job.toml") == "output_dir: Field required"
    assert config.load(tmp_path / "job.toml", ["output_dir=x"]).algorithm.name == "ga"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rte=1", ["training.learning_rte: unknown key", "did you mean 'learning_rate'?"]),
        ("trainin.steps=1", ["trainin: unknown key", "did you mean 'training'?"]),
        (
            "algorithm.retain_wieght=1",
            ["algorithm.retain_wieght: unknown key", "did you mean 'retain_weight'?"],
        ),
        ("algorithm=gdif", ["'gdif' is not one of the algorithms", "did you mean 'gdiff'?", "ga"]),
        ("anchor.name=kll", ["'kll' is not one of the anchors", "did you mean 'kl'?", "frozen"]),
        ("algorithm=no_such_lab.method", ["no_such_lab", "importable module path"]),
        ("algorithm.retain_weight=-1", ["algorithm.retain_weight", "greater than or equal to 0", "-1"]),
        ("anchor.weight=-0.5", ["anchor.weight", "greater than or equal to 0"]),
        ("anchor.weight=inf", ["anchor.weight", "finite"]),
        ("training.steps=many", ["training.steps", "valid integer", "'many'"]),
        ("targets.scope=explicit", ["targets", "belong together"]),
        ("targets.experts=[[1, 2]]", ["targets", "belong together"]),
        ("data.forget=[]", ["data.forget", "at least 1"]),
        ("data.retain=''", ["data.retain", "at least 1 character"]),
        ("cluster.num_workers=3", None),
        ("anchor=false", ["anchor: expected a name or a table like", 'name = "kl"', "got False"]),
        ("algorithm=3", ["algorithm: expected a name or a table like", "got 3"]),
        ('compare={name="a"}', ["compare: expected a list of tables: write [[compare]]"]),
        ("training=3", ["training: expected a table (got 3)"]),
        (
            "targets.experts=[0, 1]",
            ["targets.experts: expected [[layer, expert], ...] or a path (got [0, 1])"],
        ),
        ("targets.experts=7", ["targets.experts: expected [[layer, expert], ...] or a path (got 7)"]),
        ("name=a/b", ["name: allowed are letters, digits, spaces and _ . , + - (got 'a/b')"]),
        ("num_workers=2", ["num_workers: unknown key; did you mean 'cluster.num_workers'? allowed: "]),
        ("training.seed=2", ["training.seed: unknown key; did you mean 'seed'? allowed: "]),
        ("data.forget=[embedded:chemistry]", ["data.forget=[embedded", """a list is written '["a", "b"]'"""]),
        ("training.steps=true", ["training.steps: Input should be a valid integer (got True)"]),
        ("training.steps=3.0", ["training.steps: Input should be a valid integer (got 3.0)"]),
        ('training.learning_rate="1e-3"', ["training.learning_rate", "valid number (got '1e-3')"]),
        ("guards.max_kl=true", ["guards.max_kl: Input should be a valid number (got True)"]),
        ('resume="yes"', ["resume: Input should be true or false (got 'yes')"]),
        ("resume=1", ["resume: Input should be true or false (got 1)"]),
        ("anchor.weight='2'", ["anchor.weight: Input should be a valid number (got '2')"]),
        ("training.steps.x=3", ["training.steps: Input should be a valid integer"]),
        ("steps", ["'steps'", "dotted.path=value"]),
        ("training..steps=1", ["dotted.path=value"]),
    ],
)
def test_a_mistake_is_named_with_its_path(job: Path, override: str, words: list[str] | None) -> None:
    if words is None:
        assert "multiple of" in _refused(job, override, "cluster.expert_parallel_size=2")
        return
    message = _refused(job, override)
    assert all(word in message for word in words), message


def test_all_mistakes_at_once(job: Path) -> None:
    message = _refused(job, "training.steps=0", "anchor.weight=-1", "sed=3")
    assert {line.split(":")[0] for line in message.splitlines()} == {"training.steps", "anchor.weight", "sed"}


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    assert "no such job file" in _refused(tmp_path / "none.toml")
    assert "cannot be read as a job file: Is a directory" in _refused(tmp_path)
    (tmp_path / "broken.toml").write_text("training = [")
    assert "not a TOML file" in _refused(tmp_path / "broken.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "not a TOML file" in _refused(tmp_path / "binary.toml")


def test_a_mistake_is_one_line_that_says_its_place_once(job: Path) -> None:
    """A check over several keys names them itself."""
    for overrides in (
        ["targets.experts=[0, 1]"],
        ["targets.experts=[[1, 2]]"],
        ["cluster.num_workers=3", "cluster.expert_parallel_size=2"],
        ["search.searcher=optuna", "search.num_trials=2"],
    ):
        message = _refused(job, *overrides)
        key = overrides[0].partition(".")[0]
        assert len(message.splitlines()) == 1 and not message.startswith(f"{key}:"), message


@pytest.mark.parametrize("names", [("x y", "x-y"), ("full", "Full"), ("full", "full")])
def test_rows_of_the_comparison_have_folders_of_their_own(job: Path, names: tuple[str, str]) -> None:
    rows = ", ".join(f'{{name = "{name}"}}' for name in names)
    message = _refused(job, f"compare=[{rows}]")
    assert all(repr(name) in message for name in names) and "share the folder compare/" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.engine=local", "cluster.num_workers=2"], "cluster.engine = 'local' is for one worker"),
        (["cluster.engine=local", "cluster.zero_stage=1"], "cluster.zero_stage = 1 is DeepSpeed's"),
        (["cluster.zero_stage=2"], "cluster.zero_stage = 2 is DeepSpeed's"),
    ],
)
def test_engines_that_cannot_are_refused(job: Path, overrides: list[str], words: str) -> None:
    assert _refused(job, *overrides).startswith(words)
    config.load(job, [*overrides, "cluster.engine=deepspeed"])


def test_whole_numbers_may_stand_for_numbers(job: Path) -> None:
    made = config.load(job, ["training.learning_rate=1", "anchor.weight=2", "guards.max_kl=3"])
    assert (made.training.learning_rate, made.guards.max_kl) == (1.0, 3.0)
    assert type(made.training.learning_rate) is float


def test_resume_and_overwrite_exclude_each_other(job: Path) -> None:
    assert "exclude each other" in _refused(job, "resume=true", "overwrite=true")


def test_overrides_have_the_types_of_toml(job: Path) -> None:
    made = config.load(
        job,
        [
            "seed=7",
            "training.learning_rate=1e-4",
            "resume=true",
            'data.forget=["a.parquet", "b.parquet"]',
            "data.retain=some/folder=with=equals",
            "targets.experts=[[1, 5], [2, 0]]",
            "targets.scope=explicit",
            "training.stop_at_forget_accuracy=0.3",
        ],
    )
    assert (made.seed, made.training.learning_rate, made.resume) == (7, 1e-4, True)
    assert made.data.forget == ["a.parquet", "b.parquet"]
    assert made.data.retain == ["some/folder=with=equals"]
    assert made.targets.experts == [(1, 5), (2, 0)]


def test_null_takes_a_value_back(job: Path) -> None:
    overrides = [
        "training.stop_at_forget_accuracy=0.3",
        "training.stop_at_forget_accuracy=null",
        "anchor=none",
    ]
    made = config.load(job, overrides)
    assert made.training.stop_at_forget_accuracy is None
    assert made.anchor.name == "none"  # the anchor, not the missing value


def test_another_plugin_drops_the_old_ones_hyper_parameters(job: Path) -> None:
    assert config.load(job, ["algorithm.name=gdiff"]).algorithm.model_dump()["retain_weight"] == 0.5
    assert config.load(job, ["algorithm.name=ga"]).algorithm.model_dump() == {"name": "ga"}
    assert config.load(job, ["algorithm=ga"]).algorithm.model_dump() == {"name": "ga"}
    onehot = config.load(
        job, ["anchor.weight=3", "anchor.name=onehot", "anchor.reduction=mean"]
    ).anchor.model_dump()
    assert (onehot["weight"], onehot["reduction"]) == (1.0, "mean")


def test_the_default_plugin_needs_no_name(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('output_dir = "x"\n')
    made = config.load(tmp_path / "job.toml", ["anchor.weight=3", "anchor.name=kl"])
    assert made.anchor.model_dump()["weight"] == 3
    assert "algorithm.beta: unknown key" in _refused(tmp_path / "job.toml", "algorithm.beta=1")


def test_a_quoted_plugin_name_is_the_same_name(job: Path) -> None:
    made = config.load(job, ['algorithm.name="gdiff"'])
    assert made.algorithm.model_dump()["retain_weight"] == 0.5


def test_derive_is_load_with_more_overrides(job: Path) -> None:
    base = config.load(job)
    overrides = ["targets.scope=random", "training.learning_rate=3e-4", "anchor=frozen"]
    assert config.derive(base, overrides) == config.load(job, overrides)
    assert config.derive(base, []) == base


def test_a_job_survives_json(job: Path) -> None:
    base = config.load(job, ["anchor.weight=2.5"])
    again = config.validate(json.loads(json.dumps(base.model_dump(mode="json"))))
    assert again == base and type(again.algorithm) is type(base.algorithm)


@given(
    steps=st.integers(1, 10**6),
    learning_rate=st.floats(1e-9, 1e3),
    weight=st.floats(0, 1e6),
    forget=st.lists(
        st.text(st.characters(min_codepoint=32, max_codepoint=1000), min_size=1), min_size=1, max_size=3
    ),
)
def test_any_allowed_value_can_be_written_as_an_override(
    steps: int, learning_rate: float, weight: float, forget: list[str]
) -> None:
    overrides = [
        "output_dir=x",
        f"training.steps={steps}",
        f"training.learning_rate={learning_rate!r}",
        f"anchor.weight={weight!r}",
        f"data.forget={json.dumps(forget)}",
    ]
    made = config.validate(config.override({}, overrides))
    assert (made.training.steps, made.training.learning_rate) == (steps, learning_rate)
    assert (made.anchor.model_dump()["weight"], made.data.forget) == (weight, forget)
    assert config.derive(made, []) == made


def test_a_value_has_no_keys() -> None:
    with pytest.raises(ConfigError, match="seed.x: seed is a value, not a table"):
        config.override({"seed": 1}, ["seed.x=3"])


def test_override_leaves_its_input_alone() -> None:
    values: dict[str, Any] = {"training": {"steps": 1}, "algorithm": "gdiff"}
    changed = config.override(values, ["training.steps=2", "algorithm.retain_weight=2"])
    assert values == {"training": {"steps": 1}, "algorithm": "gdiff"}
    assert changed["algorithm"] == {"name": "gdiff", "retain_weight": 2}


def test_every_key_is_described() -> None:
    pending, missing = [JobConfig], []
    while pending:
        section = pending.pop()
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section):
                pending.append(field.annotation)
            elif not field.description:
                missing.append(f"{section.__name__}.{name}")
    assert not missing
