"""What is done: model, data, attribution, targets, training, evaluation, guards, variants."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from seuf_ray.config.section import LABEL, Experts, Section, Sources


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
    num_actors: int = Field(
        1,
        ge=1,
        description="Ray actors of attribution (engine = actors), and of evaluation whatever the engine; each holds "
        "the whole model",
    )
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
    experts: Experts = Field(
        None,
        description="for scope = explicit: [[layer, expert], ...], or the path of an ESFT expert configuration",
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
    learning_rate: float = Field(
        5e-3, gt=0, description="AdamW's; constant once training.warmup_steps are over"
    )
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


class GuardsConfig(Section):
    min_utility: float | None = Field(
        None, ge=0, le=1, description="end the run when utility falls under this"
    )
    max_drift: float | None = Field(
        None,
        ge=0,
        le=1,
        description="end the run when forget tokens lost more than this share of the top-k experts that the original "
        "chose for them (1 - top-k overlap, mean over all MoE layers)",
    )
    max_kl: float | None = Field(
        None,
        gt=0,
        description="end the run when the KL divergence of forget tokens' routing from the original's exceeds this "
        "(mean over all MoE layers)",
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


class Variant(Section):
    """One more row of the comparison: the job with some dotted overrides."""

    name: str = Field(pattern=LABEL, description="label of the row, and (slugged) its folder")
    overrides: list[str] = Field([], description='["targets.scope=full", "training.learning_rate=3e-4"]')

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower())
