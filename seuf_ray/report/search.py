"""A search on one page: what it found, the front, every trial as a line, what mattered, and the table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from seuf_ray import artifacts
from seuf_ray.artifacts import EvaluationReport, SearchReport, TrialRecord
from seuf_ray.report import markup, plots
from seuf_ray.report.charts import Axes
from seuf_ray.report.markup import accuracy, number, percent, plain, word, written
from seuf_ray.report.numbers import CHANCE
from seuf_ray.report.page import masthead, style
from seuf_ray.report.plots import Coordinate, Dot

COLOURS = {"finished": "var(--s1)", "stopped": "var(--s0)"}
SMALL = "small evaluation"
FIGURES = (("forget accuracy", "forget_accuracy"), ("utility", "utility"), ("drift", "drift"))


def write_search_page(
    path: Path,
    report: SearchReport,
    before: EvaluationReport | None = None,
    after: EvaluationReport | None = None,
) -> Path:
    """Write the page of a search.

    Args:
        path: where to; written aside and renamed.
        before, after: the full evaluation of the original and of `patch/`, if there are any.
    """
    facts = [("model", report.model.name), ("family", report.model.model_type), ("searcher", report.searcher)]
    facts += [("scheduler", report.scheduler), ("trials", str(len(report.trials)))]
    facts += [("seed", str(report.provenance.seed))]
    parts = [
        masthead("Search report", f"Looking for {report.objective}", facts),
        _headline(report, before, after),
        _front(report),
        _parallel(report),
        _importance(report),
        _table(report),
        _made_from(report),
    ]
    artifacts.write_text(path, markup.page("Search", style(), "\n".join(filter(None, parts))))
    return path


def _best(report: SearchReport) -> TrialRecord | None:
    return report.trials[report.best] if report.best is not None else None


def _headline(report: SearchReport, before: EvaluationReport | None, after: EvaluationReport | None) -> str:
    best = _best(report)
    if best is None:
        return markup.paragraph("No trial came to a result.", "lead")
    ends = {name: sum(trial.status == name for trial in report.trials) for name in ("finished", "stopped")}
    rest = len(report.trials) - sum(ends.values())
    found, whose = _found(report, best)
    sentence = (
        f"{found}: {ends['finished']} went on to their end, {ends['stopped']} were stopped early, "
        f"{rest} came to nothing. "
    )
    if before is not None and after is not None:
        sentence += (
            f"On all questions {whose} takes forget accuracy from {written(before.forget_accuracy, accuracy)} to "
            f"{written(after.forget_accuracy, accuracy)} and utility from {written(before.utility_accuracy, accuracy)} "
            f"to {written(after.utility_accuracy, accuracy)}."
        )
    tiles = _tiles(report, best)
    tiles += [markup.tile("Trial time", f"{_median(report):.1f} s", "median, from reset to end")]
    bases = {trial.worker for trial in report.trials if trial.worker}
    tiles += [markup.tile("Bases loaded", str(len(bases)), "one per worker group")]
    setting = f"<pre>{escape(chr(10).join(report.overrides))}</pre>" if report.goal != "pareto" else ""
    return f'{markup.paragraph(sentence, "lead")}<div class="tiles">{"".join(tiles)}</div>{setting}'


def _found(report: SearchReport, best: TrialRecord) -> tuple[str, str]:
    """What there is to say of so many trials, and whose patch is `patch/`."""
    if report.goal != "pareto":
        return f"Trial {best.number} is the best of {len(report.trials)}", "its patch"
    front, verb = len(report.chosen), "is" if len(report.chosen) == 1 else "are"
    return (
        f"{front} of {len(report.trials)} trials {verb} on the front, where nothing beats them in forget accuracy, "
        "utility and routing drift together",
        f"the patch of trial {best.number}, of these the one with the widest gap between the first two,",
    )


def _tiles(report: SearchReport, best: TrialRecord) -> list[str]:
    """The best trial's figures; of a front how far it goes in each."""
    if report.goal != "pareto":
        return [markup.tile(name, written(best.figures[key], accuracy), SMALL) for name, key in FIGURES]
    front = [report.trials[number].figures for number in report.chosen]
    ends = [(max, "highest") if key == "utility" else (min, "lowest") for _, key in FIGURES]
    return [
        markup.tile(name, written(end(f[key] for f in front), accuracy), f"{which} on the front, {SMALL}")
        for (name, key), (end, which) in zip(FIGURES, ends, strict=True)
    ]


def _median(report: SearchReport) -> float:
    seconds = sorted(trial.seconds for trial in report.trials)
    return seconds[len(seconds) // 2]


def _front(report: SearchReport) -> str:
    dots = [
        Dot(
            trial.figures["forget_accuracy"],
            trial.figures["utility"],
            _label(trial),
            "var(--s2)" if trial.number in report.chosen else COLOURS[trial.status],
            is_hollow=trial.status == "stopped",
            is_marked=trial.number in report.chosen,
        )
        for trial in report.trials
        if trial.status in COLOURS and len(trial.figures) == len(FIGURES)
    ]
    x_guides, y_guides = _guides(report)
    axes = Axes("forget accuracy", "utility", None, y_guides, x_guides, width=940, height=360)
    entries = [
        ("var(--s2)", "the best" if report.goal != "pareto" else "on the front of these and drift"),
        ("var(--s1)", "went to its end"),
        ("var(--s0)", "stopped early (hollow)"),
    ]
    caption = (
        "Left and up is better; the line is the Pareto front of these two. The mouse says what each trial is."
    )
    drawing = plots.scatter(dots, [(dot.x, dot.y) for dot in dots], axes)
    return markup.section("Trade-off", markup.figure("Utility against forgetting", drawing, entries, caption))


def _guides(report: SearchReport) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    """Lines across forget accuracy and across utility: chance, and what a trial has to keep to."""
    chance = (CHANCE, "chance")
    if report.limit is None:
        return [chance], []
    if report.goal == "utility":
        return [chance, (report.limit, f"max_forget {report.limit:g}")], []
    return [chance], [(report.limit, f"min_utility {report.limit:g}")]


def _label(trial: TrialRecord) -> str:
    values = ", ".join(f"{path} {_short(value)}" for path, value in trial.assignment.items())
    figures = ", ".join(f"{name} {trial.figures[key]:.3f}" for name, key in FIGURES if key in trial.figures)
    return f"trial {trial.number} ({trial.status}): {values}; {figures}"


def _short(value: Any) -> str:
    return (
        f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )


def _parallel(report: SearchReport) -> str:
    trials = [trial for trial in report.trials if len(trial.figures) == len(FIGURES)]
    if not trials:
        return ""
    paths = list(dict.fromkeys(path for trial in trials for path in trial.assignment))
    axes = [
        _coordinate(path, [trial.assignment.get(path) for trial in trials], report.space) for path in paths
    ]
    axes += [_coordinate(name, [trial.figures[key] for trial in trials], {}) for name, key in FIGURES]
    ranked = sorted(range(len(trials)), key=lambda at: _place(trials[at], report), reverse=True)
    shares = {at: place / max(len(trials) - 1, 1) for place, at in enumerate(ranked)}
    colours = [plots.heat(shares[at]) for at in range(len(trials))]
    marked = {at for at, trial in enumerate(trials) if trial.number in report.chosen}
    picture = plots.parallel(axes, colours, [_label(trial) for trial in trials], marked)
    caption = (
        "One line per trial, the darker the better its rank by score, "
        f"{'the best one' if report.goal != 'pareto' else 'those on the front'} thick. "
        "A line that dips below an axis is of a trial that has no such path."
    )
    return markup.section("Every trial", markup.figure("Parallel coordinates", picture, caption=caption))


def _coordinate(name: str, values: Sequence[Any], space: dict[str, Any]) -> Coordinate:
    """Numbers from low to high, evenly in their logarithm where they are drawn so; other values in rows."""
    there = [value for value in values if value is not None]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in there) and len(set(there)) > 1:
        scale = math.log if "loguniform" in space.get(name, {}) and min(there) > 0 else float
        low, high = scale(min(there)), scale(max(there))
        places = [None if v is None else (scale(v) - low) / (high - low) for v in values]
        return Coordinate(name, [(0.0, _short(min(there))), (1.0, _short(max(there)))], places)
    keys = sorted({_short(value) for value in there})
    at = {key: place / max(len(keys) - 1, 1) if len(keys) > 1 else 0.5 for place, key in enumerate(keys)}
    return Coordinate(
        name, [(at[k], k) for k in keys], [None if value is None else at[_short(value)] for value in values]
    )


def _importance(report: SearchReport) -> str:
    if not report.importance:
        return ""
    rows = [
        ("", [word(path), number(share, percent), markup.bar(share)])
        for path, share in report.importance.items()
    ]
    note = (
        "Share of the score's variance over trials that a path explains alone, corrected for chance (epsilon squared); "
        "ranges in quarters, conditional paths over the trials that have them. What two do together only is left out."
    )
    return markup.section(
        "What mattered", markup.paragraph(note, "soft"), markup.table(["path", "explains", ""], rows)
    )


def _table(report: SearchReport) -> str:
    ranked = sorted(report.trials, key=lambda trial: _place(trial, report))
    paths = list(dict.fromkeys(path for trial in report.trials for path in trial.assignment))
    head = ["trial", "score", *(name for name, _ in FIGURES), "step", "seconds", *paths, "end"]
    rows = [("strong" if t.number in report.chosen else "", _row(t, report, paths)) for t in ranked]
    return markup.section("All trials", markup.table(head, rows))


def _place(trial: TrialRecord, report: SearchReport) -> tuple[float, ...]:
    """The best or the front first, then by score; what came to nothing last."""
    score = report.scores[trial.number]
    figures = trial.figures.get("utility", 0.0), trial.figures.get("drift", 1.0)
    return trial.number not in report.chosen, math.inf if score is None else -score, -figures[0], figures[1]


def _row(trial: TrialRecord, report: SearchReport, paths: Sequence[str]) -> list[str]:
    values = [word(_short(trial.assignment[path]) if path in trial.assignment else "–") for path in paths]
    end = trial.status if trial.status == "finished" and not trial.why else f"{trial.status}: {trial.why}"
    return [
        number(trial.number, str),
        number(report.scores[trial.number], accuracy),
        *(number(trial.figures.get(key), accuracy) for _, key in FIGURES),
        number(trial.step, str),
        number(trial.seconds, plain),
        *values,
        word(end),
    ]


def _made_from(report: SearchReport) -> str:
    facts = [("search", report.fingerprint), *report.provenance.made_from.items()]
    facts += [(f"patch of trial {at}", value) for at, value in report.patches.items()]
    space = f"<pre>{escape(json.dumps(report.space, indent=1))}</pre>"
    packages = markup.chips(sorted(report.provenance.packages.items()))
    return markup.section(
        "Made from", markup.chips(facts), "<br>", packages, markup.details("The space", space)
    )
