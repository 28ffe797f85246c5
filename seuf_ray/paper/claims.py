"""What the paper's argument says of our rows, and whether they bear it out: each claim held or not, with figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, stdev

from seuf_ray.paper.settings import PaperSettings
from seuf_ray.paper.tables import NAMES, Row, Rows, select
from seuf_ray.robustness import is_inverted

GAPS = {"ga": 0.25, "gdiff": 0.25, "npo": 0.10, "rmu": 0.25}  # of utility, at fixed steps and learning rates
SEUF = ("seuf_one", "seuf_layer_top1")
FORGOTTEN = 0.45  # forget accuracy, chance is .25


@dataclass(frozen=True)
class Claim:
    """One sentence, whether the rows bear it out, and the figures."""

    says: str
    held: bool
    figures: str

    def line(self) -> str:
        """As a Markdown list item."""
        return f"- {'held' if self.held else '**not held**'}: {self.says} ({self.figures})"


def claims(rows: Rows, settings: PaperSettings) -> list[Claim]:
    """Every claim that there are rows for."""
    fixed = select(rows, protocol="fixed", model=settings.model)
    return [
        *_fixed_gaps(fixed, settings),
        *_matched_gaps(rows, settings),
        *_controls(fixed, settings),
        *_anchored(fixed, settings),
        *_not_inverted(fixed, settings),
    ]


def _fixed_gaps(rows: Rows, settings: PaperSettings) -> Iterator[Claim]:
    """SEUF's utility against full training's after the same number of steps."""
    for algorithm in settings.algorithms:
        full = _utilities(select(rows, method="full", algorithm=algorithm))
        for method in SEUF:
            ours = _utilities(select(rows, method=method, algorithm=algorithm))
            if full and ours:
                gap = mean(ours) - mean(full)
                says = f"fixed, {NAMES[algorithm]}: {method} keeps {GAPS[algorithm]:g} more utility than full"
                yield Claim(
                    says, gap >= GAPS[algorithm], f"{mean(ours):.3f} against {mean(full):.3f}, gap {gap:+.3f}"
                )


def _matched_gaps(rows: Rows, settings: PaperSettings) -> Iterator[Claim]:
    """SEUF's utility against every baseline's, where both forgot as much."""
    for forget in settings.matched_forget:
        found = select(rows, protocol="matched", forget_set=forget)
        for algorithm in settings.algorithms:
            part = select(found, algorithm=algorithm)
            for method in SEUF:
                for other in ("full", "lora", "esft"):
                    ours, theirs = select(part, method=method), select(part, method=other)
                    if ours and theirs:
                        says = (
                            f"matched, {forget}, {NAMES[algorithm]}: {method} is ahead of {other} on the mean"
                        )
                        yield _ahead(says, ours, theirs)


def _ahead(says: str, ours: list[Row], theirs: list[Row]) -> Claim:
    """Only seeds in which both got there compare."""
    gaps = _paired(ours, theirs)
    if not gaps:
        return Claim(says, False, "no seed in which both forgot as much")
    width = f" ± {stdev(gaps):.3f}" if len(gaps) > 1 else ""
    return Claim(says, mean(gaps) > 0, f"gap {mean(gaps):+.3f}{width}, {len(gaps)} seeds")


def _controls(rows: Rows, settings: PaperSettings) -> Iterator[Claim]:
    """What must not forget: an expert that the topic does not use, and routers alone."""
    for method in ("random", "routers"):
        for algorithm in settings.algorithms:
            values = [row["forget"] for row in select(rows, method=method, algorithm=algorithm)]
            if values:
                says = (
                    f"fixed, {NAMES[algorithm]}: {method} does not forget (over {FORGOTTEN:g} for every seed)"
                )
                each = ", ".join(f"{value:.3f}" for value in values)
                yield Claim(says, min(values) > FORGOTTEN, each)


def _anchored(rows: Rows, settings: PaperSettings) -> Iterator[Claim]:
    """Routing KL with the anchor against without, seeds that have both."""
    for algorithm in settings.algorithms:
        for method in SEUF:
            without = select(rows, method=f"{method}_no_anchor", algorithm=algorithm)
            seeds = {row["seed"] for row in without}
            ours = [row for row in select(rows, method=method, algorithm=algorithm) if row["seed"] in seeds]
            if without and ours:
                a, b = (mean(row["kl"] for row in part) for part in (ours, without))
                says = f"fixed, {NAMES[algorithm]}: {method}'s routing KL is smaller with the anchor"
                yield Claim(says, a < b, f"{a:.3f} against {b:.3f}, {len(ours)} seeds")


def _not_inverted(rows: Rows, settings: PaperSettings) -> Iterator[Claim]:
    """Accuracy far under chance would say that the right answer is known, and avoided."""
    for algorithm in settings.algorithms:
        for method in settings.robustness_methods:
            values = [row["forget"] for row in select(rows, method=method, algorithm=algorithm)]
            if values:
                says = f"fixed, {NAMES[algorithm]}: {method} is no inversion (three standard errors under chance)"
                held = not any(is_inverted(value, settings.measuring.final) for value in values)
                yield Claim(says, held, ", ".join(f"{value:.3f}" for value in values))


def _utilities(rows: Rows) -> list[float]:
    return [row["utility"] for row in rows]


def _paired(ours: list[Row], theirs: list[Row]) -> list[float]:
    """Differences of utility at the level, seed by seed where both got there."""
    known = {row["seed"]: row["utility_at_level"] for row in theirs if row["utility_at_level"] is not None}
    return [
        row["utility_at_level"] - known[row["seed"]]
        for row in ours
        if row["utility_at_level"] is not None and row["seed"] in known
    ]
