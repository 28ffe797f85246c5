"""What the job file of the paper's tables may say."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from seuf_ray.config import ClusterConfig, Section
from seuf_ray.errors import did_you_mean
from seuf_ray.paper.methods import ALGORITHMS, MAIN, METHODS, PAPER_ALGORITHMS

Protocol = Literal["fixed", "tune", "matched"]


class Measuring(Section):
    """How many questions are asked; part of what a cell depends on."""

    curve: int = Field(40, ge=2, description="questions of each kind along a run of fixed length")
    matched: int = Field(
        80, ge=2, description="questions of each kind along a run that ends at the matched level"
    )
    final: int = Field(160, ge=2, description="questions of each kind of the test split, at the end of a run")
    texts: int = Field(
        200, ge=1, description="forget texts for routing drift, and general ones for perplexity"
    )


class CellsConfig(ClusterConfig):
    """A worker is a cell here, and trains alone."""

    num_workers: int = Field(2, ge=1, description="cells that run at the same time")


class PaperSettings(Section):
    """Everything that `jobs/paper_tables.py` may be told."""

    output_dir: Path = Field(description="finished cells, tables and pictures; rerunning goes on from there")
    record: Path | None = Field(
        None, description="folder whose RESULTS.md and results/ are written, too, once all cells are done"
    )
    only_done: bool = Field(False, description="run nothing: write tables of the cells that are done")
    model: str = Field("embedded:specialised", description="the model of the whole matrix")
    other_models: list[str] = Field(
        ["embedded:unspecialised"], description="models that get other_methods only; no claim is made of them"
    )
    forget: str = Field("embedded:chemistry", description="forget set of the fixed protocol")
    matched_forget: list[str] = Field(
        ["embedded:chemistry", "embedded:geography"], description="forget sets of the matched protocol"
    )
    methods: list[str] = Field([*METHODS], description="rows of the fixed protocol")
    matched_methods: list[str] = Field([*MAIN], description="rows of the matched protocol")
    robustness_methods: list[str] = Field([*MAIN], description="methods that are attacked afterwards")
    other_methods: list[str] = Field(["full", "seuf_one", "seuf_layer_top1"], description="of other_models")
    algorithms: list[str] = Field([*PAPER_ALGORITHMS], description="unlearning losses")
    varied: dict[str, list[str]] = Field(
        {"rmu_retain_10": ["full", "seuf_one"]},
        description="further losses, and the methods that they run for",
    )
    whole: list[str] = Field(
        [*PAPER_ALGORITHMS],
        description="losses that methods besides the main ones get all seeds for; of others the first seed",
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="of every row")
    steps: dict[str, int] = Field({"rmu": 30}, description="steps of the fixed protocol, where not 60")
    matched_steps: int = Field(80, ge=1, description="after which a matched run gives up")
    matched_level: float = Field(0.4, gt=0, lt=1, description="forget accuracy at which utility is compared")
    rate_factors: list[float] = Field(
        [0.3, 1.0, 3.0],
        min_length=1,
        description="of the fixed learning rate: the grid of the matched protocol",
    )
    max_rates: int = Field(6, ge=1, description="learning rates tried at most where the best lies at an edge")
    measuring: Measuring = Measuring()
    overrides: list[str] = Field([], description='of every job: ["training.batch_size=16"]')
    cluster: CellsConfig = CellsConfig()

    @model_validator(mode="after")
    def _known_names(self) -> PaperSettings:
        for key in ("methods", "matched_methods", "robustness_methods", "other_methods"):
            for name in getattr(self, key):
                if name not in METHODS:
                    raise ValueError(f"{key}: {name!r} is no method; {did_you_mean(name, [*METHODS])}")
        for name in (*self.algorithms, *self.varied):
            if name not in ALGORITHMS:
                raise ValueError(f"algorithms: {name!r}; {did_you_mean(name, [*ALGORITHMS])}")
        return self

    def steps_of(self, algorithm: str) -> int:
        """Steps of the fixed protocol."""
        return self.steps.get(algorithm.split("_")[0], 60)
