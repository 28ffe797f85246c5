"""Where and how it is computed: cluster, engine, telemetry, and the artifacts to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from seuf_ray.config.section import Section


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

    @model_validator(mode="after")
    def _an_engine_that_can(self) -> ClusterConfig:
        if self.engine == "local" and self.num_workers > 1:
            raise ValueError(
                f"cluster.engine = 'local' is for one worker, and cluster.num_workers = {self.num_workers} would each "
                'train the whole job alone: set cluster.engine = "auto" or cluster.num_workers = 1'
            )
        if self.zero_stage and not self.uses_deepspeed:
            raise ValueError(
                f"cluster.zero_stage = {self.zero_stage} is DeepSpeed's, which does not run with cluster.engine = "
                f"{self.engine!r} and cluster.num_workers = {self.num_workers}: set cluster.zero_stage = 0, or "
                'cluster.engine = "deepspeed"'
            )
        return self

    @property
    def uses_deepspeed(self) -> bool:
        return self.engine == "deepspeed" or (self.engine == "auto" and self.num_workers > 1)


class InputsConfig(Section):
    attribution: Path | None = Field(None, description="attribution.json of another run to start from")
    plan: Path | None = Field(None, description="plan.json of another run to train")
    patch: Path | None = Field(None, description="patch folder of another run to evaluate")


class EngineConfig(Section):
    prefix_cache_bytes: int = Field(
        2**30,
        ge=0,
        description="memory per worker for what frozen layers compute for a batch; more goes to files",
    )
    cache_dir: Path | None = Field(
        None,
        description="folder of those files, in a folder of the job's own that is removed; default: cache in output_dir",
    )
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
