"""What the job leaves: `paper_tables.json`, `.md`, two pictures `.svg`, and its section of RESULTS.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version

from seuf_ray.artifacts import provenance, write_text
from seuf_ray.paper.cells import Cell, Result, planned
from seuf_ray.paper.claims import claims
from seuf_ray.paper.methods import METHODS, ORIGINAL, fixed_rate
from seuf_ray.paper.picture import picture
from seuf_ray.paper.settings import PaperSettings
from seuf_ray.paper.tables import NAMES, Row, all_tables, select
from seuf_ray.paper.tuning import best_rate, next_rate
from seuf_ray.recording import machine, write_section

NAME = "paper_tables"
SHOWN = ("full", "lora", "esft", "random", "seuf_one", "seuf_layer_top1")


def show_cell(cell: Cell, result: Result, done: int, total: int) -> None:
    """One line for a cell that is done."""
    row = result["row"]
    ends = f"forget {row['forget']:.3f}  utility {row['utility']:.3f}" if "forget" in row else ""
    level = row["utility_at_level"]
    at = "" if level is None else f"  utility at the level {level:.3f}"
    print(f"  {done:3d}/{total}  {cell.label}: {ends}{at}  ({result['seconds']:.0f} s)", flush=True)


def rows_of(results: Sequence[Result]) -> list[Row]:
    """One flat row for each result, to six digits, with what the attacks found."""
    return [
        {
            **_rounded(result["row"]),
            **({"robustness": result["robustness"]} if "robustness" in result else {}),
        }
        for result in results
    ]


def publish(settings: PaperSettings, results: Sequence[Result]) -> str:
    """Write everything that `settings` asks for; returns the Markdown."""
    tuning = rows_of([result for result in results if result["row"]["protocol"] == "tune"])
    rows = rows_of([result for result in results if result["row"]["protocol"] != "tune"])
    text = report(rows, tuning, settings)
    files = {f"{NAME}.json": _document(rows, tuning, results, settings), **_charts(results, settings)}
    write_text(settings.output_dir / f"{NAME}.md", text + "\n")
    places = [settings.output_dir] + ([settings.record / "results"] if settings.record else [])
    for place in places:
        for name, content in files.items():
            write_text(place / name, content)
    if settings.record is not None:
        write_section(settings.record / "RESULTS.md", NAME, text)
    return text


def report(rows: Sequence[Row], tuning: Sequence[Row], settings: PaperSettings) -> str:
    """The section: how it was made, the claims, the tables."""
    held, not_held = ([c for c in claims(rows, settings) if c.held is wanted] for wanted in (True, False))
    parts = [
        f"## {NAME}",
        f"`{command()}`",
        machine(("torch", "transformers", "peft", "ray")),
        _about(rows, settings),
        *_edges(tuning),
        f"### What reproduced, and what did not: {len(held)} of {len(held) + len(not_held)} claims held",
        "\n".join(claim.line() for claim in not_held),
        f"<details><summary>the {len(held)} that held</summary>\n",
        "\n".join(claim.line() for claim in held),
        "</details>",
        *all_tables(rows, settings),
        f"Along training (fixed; mean and standard deviation over seeds): [main rows](results/{NAME}.svg), "
        f"[controls and ablations](results/{NAME}_ablations.svg)",
    ]
    return "\n\n".join(parts)


def command() -> str:
    """As it was given, without what names a folder of this machine."""
    given = [word for word in sys.argv[1:] if not word.startswith("output_dir=")]
    return " ".join(["python jobs/paper_tables.py", *given])


def _about(rows: Sequence[Row], settings: PaperSettings) -> str:
    asked, seeds = settings.measuring, ", ".join(map(str, settings.seeds))
    matched = ", ".join(settings.matched_forget) or "none"
    done = ", ".join(
        f"{len(select(rows, protocol=name))} of {number} {name} cells"
        for name, number in planned(settings).items()
    )
    return (
        f"{settings.model}; forget set {settings.forget}, where matched {matched}; seeds {seeds} (a seed changes the "
        "order of the texts, LoRA's first values, the random expert and RMU's vector); "
        f"{done} are done. *Fixed*: learning rates and steps are given, nothing is tuned, no early stop. *Matched*: a "
        f"learning rate of {len(settings.rate_factors)} to {settings.max_rates}, chosen with the first seed on "
        "validation questions and reported on test questions. Every second question is a test question; of the forget "
        f"set, and of the other domains together, at most {asked.final} are asked at the end of a run, {asked.curve} "
        f"on the way, {asked.matched} where matched. Chance is .25. Perplexity is on the general texts that retain "
        "terms train on. Mean ± standard deviation over seeds; where one seed ran, it says so."
    )


def _edges(tuning: Sequence[Row]) -> Iterator[str]:
    """Rows of the matched protocol for which a rate beyond those tried might have been better."""
    tried: dict[tuple[str, str, str], dict[float, float | None]] = {}
    for row in tuning:
        key = (row["forget_set"], row["method"], row["algorithm"])
        tried.setdefault(key, {})[row["learning_rate"]] = row["utility_at_level"]
    found = []
    for (forget, method, algorithm), rates in tried.items():
        if any(rates.values()) and next_rate(rates, max_rates=len(rates) + 1) is not None:
            best = best_rate(rates, fixed_rate(method, algorithm))
            found.append(f"{METHODS[method].label} with {NAMES[algorithm]} on {forget} ({best:g})")
    if found:
        yield f"The best rate is the last one tried, so the next might be better still: {'; '.join(found)}."


def _document(
    rows: Sequence[Row], tuning: Sequence[Row], results: Sequence[Result], settings: PaperSettings
) -> str:
    made = provenance(settings.seeds[0])
    about = {
        "command": command(),
        "seeds": settings.seeds,
        "machine": machine(("torch", "transformers", "peft", "ray")),
        "packages": made.packages | {"peft": version("peft")},
        "settings": settings.model_dump(mode="json", exclude={"output_dir", "record"}),
    }
    curves = [
        {
            key: result["row"][key]
            for key in ("model", "forget_set", "method", "algorithm", "seed", "protocol")
        }
        | {
            "curve": [
                [p["step"], round(p["forget_accuracy"], 4), round(p["utility"], 4)] for p in result["curve"]
            ]
        }
        for result in results
        if result["row"]["protocol"] != "tune" and result["curve"]
    ]
    lists: dict[str, Sequence[Row]] = {"rows": rows, "tuning": tuning, "curves": curves}
    lines = {key: "[\n" + ",\n".join(map(json.dumps, items)) + "\n]" for key, items in lists.items()}
    head = json.dumps(about, indent=1)[:-2]
    return head + "".join(f',\n "{key}": {text}' for key, text in lines.items()) + "\n}\n"


def _rounded(row: Row) -> Row:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def _charts(results: Sequence[Result], settings: PaperSettings) -> dict[str, str]:
    """The main rows, and all others."""
    fixed = [r for r in results if select([r["row"]], protocol="fixed", model=settings.model)]
    ran = {result["row"]["method"] for result in fixed}
    rest = [name for name in METHODS if name not in (*SHOWN, ORIGINAL)]

    def chart(methods: Iterable[str]) -> str:
        shown = [name for name in methods if name in ran]
        return picture(fixed, shown, settings.algorithms, settings.matched_level)

    return {f"{NAME}.svg": chart(SHOWN), f"{NAME}_ablations.svg": chart(rest)}
