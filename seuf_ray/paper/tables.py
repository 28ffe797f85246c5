"""Rows -> Markdown: the paper's tables, the matched protocol, robustness; mean ± standard deviation over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from seuf_ray.paper.methods import METHODS, ORIGINAL, WEIGHTS
from seuf_ray.paper.numbers import ANCHORS, DEEPSEEK, QWEN, RATIO, TOP_M, Pair
from seuf_ray.paper.settings import PaperSettings

Row = dict[str, Any]
Rows = Sequence[Row]
FIGURES = ("forget", "utility", "perplexity", "overlap", "kl")
HEADS = ("forget ↓", "utility ↑", "perplexity", "first choices kept", "routing KL")  # of these
NAMES = {"ga": "GA", "gdiff": "GDiff", "npo": "NPO", "rmu": "RMU", "rmu_retain_10": "RMU, retain weight 10"}
ATTACKS = ("int8", "int4", "forced_routing", "paraphrase", "relearned")


def select(rows: Rows, **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """`.842 ± .013`; the spread only where there are several values, a dash where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text = _short(mean(known), digits)
    return f"{text} ± {_short(stdev(known), digits)}" if len(known) > 1 else text


def _short(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.3g}" if abs(value) >= 100 else f"{value:.{digits}f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = "|" + "---|" * len(head)
    return "\n".join(
        ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]
    )


def paper(numbers: dict[tuple[str, str], Pair], method: str, algorithm: str) -> str:
    """The paper's forget / utility of this row, if it has one."""
    found = numbers.get((method, "" if method == ORIGINAL else algorithm))
    return f"{found[0]} / {found[1]}" if found else ""


def all_tables(rows: Rows, settings: PaperSettings) -> list[str]:
    """Every table that there are rows for, each with its heading."""
    fixed = select(rows, protocol="fixed", model=settings.model)
    parts = [
        ("Main table, fixed protocol", _main(fixed, settings)),
        ("Matched protocol", _matched(rows, settings)),
        (
            "Tunable module (fixed)",
            _compared(fixed, ("full", "experts", "routers", "random", "seuf_one"), settings),
        ),
        ("Top-M (fixed)", _top_m(fixed, settings)),
        ("Anchors (fixed)", _anchors(fixed, settings)),
        ("Anchor weight (fixed, GA, one expert)", _weights(fixed)),
        ("Trainable ratio (fixed, GA)", _ratio(fixed)),
        ("Robustness (fixed, first seed): forget accuracy after each attack", _robustness(fixed, settings)),
        ("RMU with retain weight 10 (fixed)", _varied(fixed, settings)),
        *((f"{model} (fixed; no claim)", _other(rows, model, settings)) for model in settings.other_models),
    ]
    return [f"### {title}\n\n{table}" for title, table in parts if table]


def _cells(rows: Rows) -> list[str]:
    return [spread((row[figure] for row in rows), 2 if figure == "perplexity" else 3) for figure in FIGURES]


def _main(rows: Rows, settings: PaperSettings) -> str:
    names = [
        name
        for name in settings.methods
        if name in ("full", "lora", "esft", "random", "seuf_one", "seuf_layer_top1")
    ]
    head = ["algorithm", "method", *HEADS, "seeds", "paper: Qwen", "paper: DeepSeek"]
    lines = [_line(rows, ORIGINAL, settings.algorithms[0], "")]
    lines += [
        _line(rows, name, algorithm, NAMES[algorithm]) for algorithm in settings.algorithms for name in names
    ]
    return markdown(head, [line for line in lines if line])


def _line(rows: Rows, method: str, algorithm: str, shown: str) -> list[str]:
    found = select(rows, method=method, algorithm=algorithm)
    if not found:
        return []
    papers = [paper(numbers, method, algorithm) for numbers in (QWEN, DEEPSEEK)]
    return [shown, METHODS[method].label, *_cells(found), str(len(found)), *papers]


def _compared(rows: Rows, methods: Sequence[str], settings: PaperSettings) -> str:
    """forget / utility of each method, one column for each algorithm, the paper's GA on Qwen beside it."""
    head = ["method", *(NAMES[algorithm] for algorithm in settings.algorithms), "paper: Qwen, GA"]
    lines = []
    for method in methods:
        found = [select(rows, method=method, algorithm=algorithm) for algorithm in settings.algorithms]
        if any(found):
            lines.append([METHODS[method].label, *map(_pair, found), paper(QWEN, method, "ga")])
    return markdown(head, lines) if lines else ""


def _pair(rows: Rows) -> str:
    if not rows:
        return ""
    alone = " (1 seed)" if len(rows) == 1 else ""
    return f"{spread(row['forget'] for row in rows)} / {spread(row['utility'] for row in rows)}{alone}"


def _top_m(rows: Rows, settings: PaperSettings) -> str:
    names = ("seuf_one", "seuf_same_layer", "seuf_layer_top1", "seuf_layer_top2", "seuf_layer_top3")
    table = _compared(rows, names, settings)
    return table and f"{table}\n\nThe paper (DeepSeek, GA, WMDP, utility at forget ≈ .25): {TOP_M}."


def _anchors(rows: Rows, settings: PaperSettings) -> str:
    """forget / utility / routing KL."""
    lines = []
    for base in ("seuf_one", "seuf_layer_top1"):
        for name in (base, f"{base}_no_anchor", f"{base}_onehot", f"{base}_frozen"):
            found = [select(rows, method=name, algorithm=algorithm) for algorithm in settings.algorithms]
            cells = [f"{_pair(part)} / {spread(row['kl'] for row in part)}" if part else "" for part in found]
            lines += [[METHODS[name].label, *cells]] if any(found) else []
    head = ["forget / utility / KL", *(NAMES[algorithm] for algorithm in settings.algorithms)]
    return (
        f"{markdown(head, lines)}\n\nThe paper (GA, WMDP, utility at forget ≈ .25): {ANCHORS}."
        if lines
        else ""
    )


def _weights(rows: Rows) -> str:
    found = {weight: select(rows, method=name, algorithm="ga") for weight, name in WEIGHTS.items()}
    lines = [[f"{weight:g}", *_cells(part)] for weight, part in found.items() if part]
    return markdown(["weight", *HEADS], lines) if lines else ""


def _ratio(rows: Rows) -> str:
    lines = []
    for method in METHODS:
        found = select(rows, method=method, algorithm="ga")
        if found and method != ORIGINAL and "weight" not in method:
            share = f"{100 * found[0]['trainable_fraction']:.2f} %"
            lines.append([METHODS[method].label, share, *_cells(found)[:2], f"{found[0]['learning_rate']:g}"])
    table = markdown(["method", "trained", "forget", "utility", "learning rate"], lines)
    return f"{table}\n\nThe paper: {RATIO}." if lines else ""


def _matched(rows: Rows, settings: PaperSettings) -> str:
    """Utility at the level, on test questions; learning rates as chosen on validation questions."""
    parts = []
    for forget in settings.matched_forget:
        found = select(rows, protocol="matched", forget_set=forget)
        lines = []
        for method in settings.matched_methods:
            each = [select(found, method=method, algorithm=algorithm) for algorithm in settings.algorithms]
            lines += [[METHODS[method].label, *map(_at_level, each)]] if any(each) else []
        head = [f"forget set {forget}", *(NAMES[algorithm] for algorithm in settings.algorithms)]
        parts += [markdown(head, lines)] if lines else []
    said = (
        f"Utility where forget accuracy first falls to {settings.matched_level:g} (chosen learning rate; steps taken). "
        "A number of seeds is given where not all got there."
    )
    return "\n\n".join([said, *parts]) if parts else ""


def _at_level(rows: Rows) -> str:
    if not rows:
        return ""
    reached = [row["utility_at_level"] for row in rows if row["utility_at_level"] is not None]
    steps = f"{rows[0]['learning_rate']:g}; {min(row['steps'] for row in rows)}–{max(row['steps'] for row in rows)}"
    some = f" ({len(reached)} of {len(rows)} seeds)" if len(reached) < len(rows) else ""
    return f"{spread(reached)}{some} ({steps})"


def _robustness(rows: Rows, settings: PaperSettings) -> str:
    """What came back of the forget set, and what rounding costs the rest."""
    lines = []
    for algorithm in settings.algorithms:
        for method in (ORIGINAL, *settings.robustness_methods):
            for row in select(rows, method=method, algorithm=algorithm):
                if found := row.get("robustness"):
                    shown = [_short(found[name], 3) for name in ATTACKS]
                    kept = [_short(found[f"{name}_utility"], 3) for name in ("int8", "int4")]
                    name = NAMES[algorithm] if method != ORIGINAL else ""
                    lines.append([name, METHODS[method].label, _short(row["forget"], 3), *shown, *kept])
    head = [
        "algorithm",
        "method",
        "before",
        "int8",
        "int4",
        "forced routing",
        "paraphrase",
        "relearned",
        "utility, int8",
        "utility, int4",
    ]
    said = (
        "int8 and int4: weights of all experts rounded; forced routing: the original's choices of experts; paraphrase: "
        "other held-out wordings; relearned: on test facts, after 20 steps of training everything on the other half."
    )
    return f"{markdown(head, lines)}\n\n{said}" if lines else ""


def _varied(rows: Rows, settings: PaperSettings) -> str:
    lines = [
        [METHODS[method].label, *_cells(found)[:3]]
        for algorithm, methods in settings.varied.items()
        for method in methods
        if (found := select(rows, method=method, algorithm=algorithm))
    ]
    return markdown(["method", "forget", "utility", "perplexity"], lines) if lines else ""


def _other(rows: Rows, model: str, settings: PaperSettings) -> str:
    found = select(rows, protocol="fixed", model=model)
    lines = [_line(found, ORIGINAL, settings.algorithms[0], "")]
    lines += [_line(found, name, a, NAMES[a]) for a in settings.algorithms for name in settings.other_methods]
    head = ["algorithm", "method", *HEADS, "seeds"]
    return markdown(head, [line[: len(head)] for line in lines if line]) if any(lines) else ""
