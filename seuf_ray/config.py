"""Everything a job file may say.

One dotted path (`algorithm.beta`) is the TOML key, the command-line override and the search key. Unknown keys and
wrong values are refused with that path, what is allowed and a did-you-mean, before torch or Ray is started.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from seuf_ray import plugins
from seuf_ray.errors import ConfigError, did_you_mean
from seuf_ray.plugins import Plugin

LABEL = r"^[\w .,+-]+$"


class Section(BaseModel):
    """A table of the job file: frozen, and a key that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


DEFAULT_PLUGINS = {"algorithm": "ga", "anchor": "kl"}  # where a section gives hyper-parameters only


def _plugin(section: str) -> Callable[[Any], Any]:
    def resolve(value: Any) -> Any:
        if isinstance(value, Plugin):
            return value
        values = {
            "name": DEFAULT_PLUGINS[section],
            **({"name": value} if isinstance(value, str) else dict(value)),
        }
        return plugins.find(f"{section}s", str(values["name"])).model_validate(values)

    return resolve


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Sources = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
Algorithm = Annotated[SerializeAsAny[Plugin], BeforeValidator(_plugin("algorithm"))]
Anchor = Annotated[SerializeAsAny[Plugin], BeforeValidator(_plugin("anchor"))]


class ModelConfig(Section):
    name: str = Field("embedded:specialised", description="embedded:NAME, a Hugging Face folder, or a hub id")
    revision: str | None = Field(None, description="hub revision (commit, tag or branch)")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the frozen weights while computing"
    )


class DataConfig(Section):
    forget: Sources = Field(
        ["embedded:chemistry"], description="what must be forgotten: source or list of sources"
    )
    retain: Sources = Field(["embedded:general"], description="what must be kept: source or list of sources")
    text_field: str = Field("text", description="column that holds the text in parquet, JSONL and hub data")
    sequence_length: int = Field(256, ge=2, description="tokens per row; longer texts are split")
    max_rows: int | None = Field(None, ge=1, description="use only the first N texts of each source")
    idk_answer: str = Field(
        "I don't know.",
        min_length=1,
        description="what algorithms with an idk pass (dpo) put in place of a forget text's end",
    )
    max_bad_rows: int = Field(
        0, ge=0, description="malformed rows tolerated per source before the job is refused"
    )


class AttributionConfig(Section):
    score: Literal["affinity", "router_score", "token_share", "contrast"] = Field(
        "affinity",
        description="what experts are ranked by; contrast: affinity on the forget set less that on the retain set",
    )
    bootstrap: int = Field(
        32,
        ge=0,
        le=1000,
        description="resamplings of the sequences that say how stable the ranking is; 0: none",
    )
    engine: Literal["auto", "actors", "expert_parallel", "streamed"] = Field(
        "auto",
        description="actors that hold the model; a worker group that shares its experts; one layer at a time from the "
        "checkpoint; auto: the first of these that fits",
    )
    num_actors: int = Field(1, ge=1, description="Ray actors that hold the model")
    unit_rows: int = Field(
        8,
        ge=1,
        description="packed rows of data.sequence_length tokens per unit, which goes through one forward pass",
    )
    max_tokens: int | None = Field(
        None, ge=1, description="of each set, stop after about so many tokens (100 k are enough)"
    )
    hidden_bytes: int = Field(
        2**31, ge=0, description="memory of a streamed pass for hidden states; more goes to files"
    )


Scope = Literal[
    "model",
    "layer",
    "same_layer",
    "random",
    "explicit",
    "esft",
    "full",
    "experts",
    "routers",
    "shared",
    "lora",
]


class TargetsConfig(Section):
    scope: Scope = Field(
        "model",
        description="model: top-M of the whole model; layer: top-M of every MoE layer; same_layer: top-M of the best "
        "expert's layer; random: M seeded ones; explicit: those in experts; and the baselines esft: of every layer the "
        "best until their share is reached, without routers; full: every parameter; experts, routers, shared: all "
        "routed experts, routers or shared experts; lora: adapters on attention and experts",
    )
    top_m: int = Field(1, ge=1, description="M, the number of target experts (per layer for scope = layer)")
    experts: list[tuple[int, int]] | None = Field(
        None, description="[[layer, expert], ...] for scope = explicit"
    )
    share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="of a layer's score that scope = esft trains (p in ESFT, by token_share there)",
    )
    lora_rank: int = Field(8, ge=1, description="r of scope = lora")
    lora_alpha: float = Field(16.0, gt=0, description="alpha of scope = lora, which scales by alpha / r")

    @model_validator(mode="after")
    def _explicit_names_experts(self) -> TargetsConfig:
        if (self.scope == "explicit") != bool(self.experts):
            raise ValueError("targets.experts and targets.scope = 'explicit' belong together")
        return self


class TrainingConfig(Section):
    steps: int = Field(60, ge=1, description="optimiser steps")
    batch_size: int = Field(32, ge=1, description="rows per step over all workers")
    learning_rate: float = Field(5e-3, gt=0, description="AdamW, constant")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up to the learning rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's; it can only touch the plan's tensors")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping over all tensors of the plan")
    evaluate_every: int = Field(
        10, ge=1, description="steps between the small evaluations that make the curves"
    )
    max_questions: int = Field(96, ge=1, description="questions of each kind in a small evaluation")
    stop_at_forget_accuracy: float | None = Field(
        None, ge=0, le=1, description="stop once the small evaluation's forget accuracy is at or below this"
    )


class EvaluationConfig(Section):
    forget: Sources | None = Field(
        None, description="question sources for forget accuracy; default: data.forget"
    )
    utility: Sources | None = Field(
        None,
        description="question sources whose mean accuracy is utility; default: the other embedded domains",
    )
    perplexity: Sources = Field(["embedded:general"], description="text sources for perplexity")
    question_format: Literal["cloze", "letters"] = Field(
        "cloze",
        description="cloze: each choice continues the question; letters: A-D are listed and answered (MMLU)",
    )
    max_questions: int | None = Field(None, ge=1, description="questions per source; default all")
    max_texts: int = Field(400, ge=1, description="texts per source for perplexity and routing drift")
    unit_rows: int = Field(64, ge=1, description="rows per forward pass")


class ClusterConfig(Section):
    address: str | None = Field(None, description="Ray cluster address; default: RAY_ADDRESS or a local one")
    num_workers: int = Field(1, ge=1, description="training processes")
    expert_parallel_size: int = Field(1, ge=1, description="processes that share one copy of the experts")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="DeepSpeed ZeRO stage for the trained tensors' optimizer"
    )
    engine: Literal["auto", "local", "deepspeed"] = Field(
        "auto", description="auto: deepspeed for several workers"
    )
    max_failures: int = Field(2, ge=0, description="worker failures after which training gives up")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs of one worker or actor")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of one worker or actor")

    @model_validator(mode="after")
    def _groups_divide(self) -> ClusterConfig:
        if self.num_workers % self.expert_parallel_size:
            raise ValueError(
                f"cluster.num_workers ({self.num_workers}) must be a multiple of "
                f"cluster.expert_parallel_size ({self.expert_parallel_size})"
            )
        return self

    @property
    def uses_deepspeed(self) -> bool:
        return self.engine == "deepspeed" or (self.engine == "auto" and self.num_workers > 1)


class InputsConfig(Section):
    attribution: Path | None = Field(None, description="attribution.json of another run to start from")
    plan: Path | None = Field(None, description="plan.json of another run to train")
    patch: Path | None = Field(None, description="patch folder of another run to evaluate")


class GuardsConfig(Section):
    min_utility: float | None = Field(
        None, ge=0, le=1, description="end the run when utility falls under this"
    )
    max_drift: float | None = Field(
        None,
        ge=0,
        le=1,
        description="... when 1 - top-k overlap on forget tokens, over all MoE layers, exceeds this",
    )
    max_kl: float | None = Field(
        None, gt=0, description="... when the routing KL on forget tokens exceeds this"
    )
    action: Literal["stop", "rollback"] = Field(
        "rollback", description="keep the tensors, or go back to the best step"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="which step's tensors are the result of a whole run"
    )
    metric: Literal["gap", "utility", "forget_accuracy"] = Field(
        "gap",
        description="what best means: utility - forget accuracy, highest utility, lowest forget accuracy",
    )

    @property
    def has_limits(self) -> bool:
        return any(limit is not None for limit in (self.min_utility, self.max_drift, self.max_kl))


class EngineConfig(Section):
    prefix_cache_bytes: int = Field(
        2**30,
        ge=0,
        description="memory per worker for what frozen layers compute for a batch; more goes to files",
    )
    cache_dir: Path | None = Field(None, description="folder of those files; default: cache in output_dir")
    gradient_checkpointing: bool = Field(
        False, description="recompute layers and head in the backward pass: less memory, more time"
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="rows per forward pass of one worker; a larger batch is accumulated. Default: all",
    )


class TelemetryConfig(Section):
    every: int = Field(
        1, ge=0, description="steps between looks at how the step's forget batch is routed; 0: never"
    )
    anchor_gradient_every: int = Field(
        20,
        ge=0,
        description="steps between looks at the anchor's own gradient, a partial backward pass; 0: never",
    )
    reference: bool = Field(
        False,
        description="run the original for this even where no loss asks for it, up to the last MoE layer",
    )


class Variant(Section):
    """One more row of the comparison: the job with some dotted overrides."""

    name: str = Field(pattern=LABEL, description="label of the row, and (slugged) its folder")
    overrides: list[str] = Field([], description='["targets.scope=full", "training.learning_rate=3e-4"]')


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

    @model_validator(mode="after")
    def _one_way_to_continue(self) -> JobConfig:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
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
        raise ConfigError("\n".join(_explain(kind, values, error))) from None


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
        value = _toml_value(text)
        if path in ("algorithm.name", "anchor.name") and _plugin_name(values, parents[0]) != value:
            values = {**values, parents[0]: {}}  # another plug-in: its hyper-parameters are other ones
        values = _set(values, parents, key, value)
    return values


def _plugin_name(values: dict[str, Any], section: str) -> str:
    value = values.get(section, {})
    return str(value.get("name", DEFAULT_PLUGINS[section]) if isinstance(value, dict) else value)


def _set(values: dict[str, Any], parents: list[str], key: str, value: Any) -> dict[str, Any]:
    if parents:
        child = values.get(parents[0], {})
        child = {"name": child} if isinstance(child, str) else child
        if not isinstance(child, dict):
            raise ConfigError(f"override {'.'.join([*parents, key])}: {parents[0]} is a value, not a table")
        return {**values, parents[0]: _set(child, parents[1:], key, value)}
    return {**values, key: value}


def _toml_value(text: str) -> Any:
    if text == "null":  # TOML has no such value; "none" is an anchor
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[BaseModel], values: dict[str, Any], error: ValidationError) -> list[str]:
    """One line per mistake: dotted path, what is wrong, what is allowed."""
    lines: list[str] = []
    for item in error.errors():
        loc = item["loc"]
        where = ".".join(str(part) for part in loc)
        if item["type"] == "extra_forbidden":
            lines.append(
                f"{where}: unknown key; {did_you_mean(str(loc[-1]), _fields_at(kind, values, loc[:-1]))}"
            )
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            lines.append(f"{where}: {message}{got}".removeprefix(": "))
    return lines


def _fields_at(model: type[BaseModel], values: dict[str, Any], loc: Sequence[Any]) -> list[str]:
    """The keys that the table at `loc` may have."""
    if loc and loc[0] in ("algorithm", "anchor"):
        return list(plugins.find(f"{loc[0]}s", _plugin_name(values, str(loc[0]))).model_fields)
    for part in loc:
        if not isinstance(part, int):
            annotation = model.model_fields[part].annotation
            found = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
            model = next((a for a in found if issubclass(a, BaseModel)), model)
    return list(model.model_fields)
