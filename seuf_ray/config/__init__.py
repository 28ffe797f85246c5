"""Everything a job file may say.

One dotted path (`algorithm.beta`) is the TOML key, the command-line override and the search key. Unknown keys and
wrong values are refused with that path, what is allowed and a did-you-mean, before torch or Ray is started.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from seuf_ray.config.machine import ClusterConfig, EngineConfig, InputsConfig, TelemetryConfig
from seuf_ray.config.method import (
    AttributionConfig,
    DataConfig,
    EvaluationConfig,
    GuardsConfig,
    ModelConfig,
    TargetsConfig,
    TrainingConfig,
    Variant,
)
from seuf_ray.config.mistakes import explain, plugin_name
from seuf_ray.config.search import SearchConfig
from seuf_ray.config.section import LABEL, Algorithm, Anchor, Section
from seuf_ray.errors import ConfigError

__all__ = [
    "AttributionConfig",
    "ClusterConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardsConfig",
    "InputsConfig",
    "JobConfig",
    "ModelConfig",
    "SearchConfig",
    "Section",
    "TargetsConfig",
    "TelemetryConfig",
    "TrainingConfig",
    "Variant",
    "derive",
    "load",
    "override",
    "validate",
]


class JobConfig(Section):
    name: str = Field("this job", pattern=LABEL, description="label of this job in tables and reports")
    output_dir: Path = Field(description="where every artifact of this job goes")
    seed: int = Field(0, ge=0, description="the only source of randomness")
    resume: bool = Field(False, description="continue a run of the same config in output_dir")
    overwrite: bool = Field(False, description="replace the run that output_dir holds")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    attribution: AttributionConfig = AttributionConfig()
    targets: TargetsConfig = TargetsConfig()
    algorithm: Algorithm = Field(
        "ga", validate_default=True, description="unlearning loss and its hyper-parameters"
    )
    anchor: Anchor = Field("kl", validate_default=True, description="router anchor and its hyper-parameters")
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    engine: EngineConfig = EngineConfig()
    guards: GuardsConfig = GuardsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    inputs: InputsConfig = InputsConfig()
    compare: list[Variant] = Field([], description="further variants that the pipeline trains for its tables")
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _one_way_to_continue(self) -> JobConfig:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        return self

    @model_validator(mode="after")
    def _a_folder_for_each_row(self) -> JobConfig:
        for one, other in itertools.combinations(self.compare, 2):
            if one.slug == other.slug:
                raise ValueError(
                    f"compare: rows {one.name!r} and {other.name!r} would share the folder compare/{one.slug}: give "
                    "one of them another name"
                )
        return self

    @property
    def forget_questions(self) -> list[str]:
        return self.evaluation.forget or self.data.forget

    @property
    def utility_questions(self) -> list[str]:
        from seuf_ray.embedded import DOMAINS  # the only default that knows the embedded data

        return self.evaluation.utility or [
            f"embedded:{d}" for d in DOMAINS if f"embedded:{d}" not in self.data.forget
        ]


S = TypeVar("S", bound=Section)
WRITTEN_AS = {  # what texts that begin so were meant to be
    "[": """a list is written '["a", "b"]' (the outer quotes are the shell's)""",
    "{": """a table is written '{key = "a"}' (the outer quotes are the shell's)""",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job file at `path` with `dotted.path=value` overrides on top; raises what `load_as` does."""
    return load_as(JobConfig, path, overrides)


def load_as(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The file at `path` with `dotted.path=value` overrides on top, as `kind` has it.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, or a value is not allowed.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such job file") from error
    except OSError as error:  # a folder, or a file of somebody else's
        raise ConfigError(f"{path}: cannot be read as a job file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    return validate_as(kind, override(values, overrides))


def validate(values: dict[str, Any]) -> JobConfig:
    """`values` (nested, as TOML gives them) as a JobConfig; raises ConfigError with one line per mistake."""
    return validate_as(JobConfig, values)


def validate_as(kind: type[S], values: dict[str, Any]) -> S:
    """`values` as `kind`; raises ConfigError with one line per mistake."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(kind, values, error))) from None


def derive(config: JobConfig, overrides: Sequence[str]) -> JobConfig:
    """`config` with dotted overrides; what `compare` and a search trial do."""
    return validate(override(config.model_dump(mode="json"), overrides))


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with each `dotted.path=value` set; a plug-in whose name changes drops its old hyper-parameters."""
    for item in overrides:
        path, separator, text = item.partition("=")
        if not separator or not re.fullmatch(r"\w+(\.\w+)*", path):
            raise ConfigError(
                f"override {item!r}: expected dotted.path=value, as in training.learning_rate=1e-3"
            )
        *parents, key = path.split(".")
        value = _toml_value(path, text)
        if path in ("algorithm.name", "anchor.name") and plugin_name(values, parents[0]) != value:
            values = {**values, parents[0]: {}}  # another plug-in: its hyper-parameters are other ones
        values = _set(values, parents, key, value)
    return values


def _set(values: dict[str, Any], parents: list[str], key: str, value: Any) -> dict[str, Any]:
    if parents:
        child = values.get(parents[0], {})
        child = {"name": child} if isinstance(child, str) else child
        if not isinstance(child, dict):
            raise ConfigError(f"override {'.'.join([*parents, key])}: {parents[0]} is a value, not a table")
        return {**values, parents[0]: _set(child, parents[1:], key, value)}
    return {**values, key: value}


def _toml_value(path: str, text: str) -> Any:
    if text == "null":  # TOML has no such value; "none" is an anchor
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text[:1] in WRITTEN_AS:  # as a text it would be a file of a very odd name
            raise ConfigError(f"override {path}={text}: {WRITTEN_AS[text[:1]]}") from None
        return text
