"""What jobs/search.py tries, what it is after, and how it looks for it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from seuf_ray.config.section import Section
from seuf_ray.errors import ConfigError


class SearchConfig(Section):
    space: dict[str, Any] = Field(
        {},
        description="dotted path -> {choice = [...]}, {grid = [...]}, {uniform = [low, high]}, "
        '{loguniform = [low, high]} or {randint = [low, high]}; and when = {"algorithm.name" = "rmu"} where '
        "only some trials have it",
    )
    num_trials: int = Field(
        32,
        ge=1,
        description="number of trials; with searcher = random so many for each combination of the grid paths' values; "
        "searcher = grid has one trial for each combination, whatever this is",
    )
    searcher: Literal["grid", "random", "optuna", "nsga2"] = Field(
        "random", description="optuna: its TPE, for one objective or several; nsga2: optuna's, for several"
    )
    scheduler: Literal["none", "asha"] = Field(
        "none",
        description="asha: a trial ends early where most of the trials before it were better at that step",
    )
    eta: int = Field(
        3, ge=2, description="asha goes on with the best 1 / eta, at steps that are eta times apart"
    )
    grace_steps: int = Field(10, ge=1, description="steps that asha lets every trial take")
    objective: Literal["utility", "forget", "pareto"] = Field(
        "utility",
        description="highest utility with forget accuracy of at most max_forget; lowest forget accuracy with "
        "utility of at least min_utility; or all that nothing beats in forget accuracy, utility and routing "
        "drift together",
    )
    max_forget: float = Field(0.3, ge=0, le=1, description="of objective = utility")
    min_utility: float = Field(0.95, ge=0, le=1, description="of objective = forget")
    max_concurrent: int = Field(
        2,
        ge=1,
        description="trials that run at once, where the cluster has room. What optuna, nsga2 and asha decide about a "
        "trial rests on all results but those of the 2 x max_concurrent trials before it, so that a search can be "
        "repeated: with these, keep it under half of the trials",
    )

    @model_validator(mode="after")
    def _one_objective_where_it_takes_one(self) -> SearchConfig:
        if self.objective == "pareto" and self.scheduler == "asha":
            raise ValueError("search.scheduler = 'asha' orders trials by one objective, 'pareto' has several")
        if self.searcher == "nsga2" and self.objective != "pareto":
            raise ValueError(
                "search.searcher = 'nsga2' is for search.objective = 'pareto'; allowed here: 'optuna'"
            )
        return self

    @model_validator(mode="after")
    def _results_where_it_learns(self) -> SearchConfig:
        if self.searcher in ("optuna", "nsga2"):  # the others' spaces say how many trials there are
            self.require_results(self.num_trials)
        return self

    @property
    def lag(self) -> int:
        """How many trials before it a trial knows nothing of."""
        return 2 * self.max_concurrent

    def require_results(self, total: int) -> None:
        """Refuse a search of `total` trials whose last one would know too few results to make use of them.

        Raises:
            ConfigError: with what is allowed.
        """
        learns = f"search.searcher = {self.searcher!r}" if self.searcher in ("optuna", "nsga2") else None
        who, needed = ("search.scheduler = 'asha'", self.eta) if self.scheduler == "asha" else (learns, 1)
        if who is None or total - self.lag >= needed:
            return
        most = (total - needed) // 2
        raise ConfigError(
            f"search.max_concurrent = {self.max_concurrent}: the last of {total} trials would know the results of "
            f"{max(0, total - self.lag)}, and {who} needs {needed}; allowed: "
            + (f"at most {most}" if most else f"1, with at least {needed + 2} trials")
        )
