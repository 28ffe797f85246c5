"""What the benchmarks share: interleaved timing, one JSON line per figure, and sections of RESULTS.md.

Contestants take turns within one process and one run, so whatever else the machine does meets all of them; a figure
is the median of at least five turns after a warm-up. Two clocks run: wall time, which is what a figure says, and the
process's CPU time, which does not see other jobs on shared cores and is therefore given beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from seuf_ray.recording import machine, write_section

RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclass(frozen=True)
class Figure:
    """One line of output: ours against theirs. `ratio` is theirs / ours unless `says` says otherwise."""

    figure: str
    ours: float | None
    theirs: float | None
    ratio: float | None
    unit: str
    says: str

    def json(self) -> str:
        """The line; the sentence is for RESULTS.md only."""
        values = {"figure": self.figure, "ours": _round(self.ours), "theirs": _round(self.theirs)}
        return json.dumps({**values, "ratio": _round(self.ratio), "unit": self.unit})


@dataclass(frozen=True)
class Timing:
    """Median seconds of one contestant's turns, by both clocks."""

    wall: float
    cpu: float


def interleaved(
    contestants: Mapping[str, Callable[[], object]], rounds: int = 5, device: str = "cpu"
) -> dict[str, Timing]:
    """Everybody's median turn: one warm-up round, then `rounds` rounds in which each takes one turn."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, turn in contestants.items():
            seconds = _seconds(turn, device)
            if number:
                turns[name].append(seconds)
    return {
        name: Timing(statistics.median(w for w, _ in taken), statistics.median(c for _, c in taken))
        for name, taken in turns.items()
    }


def _seconds(turn: Callable[[], object], device: str) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    turn()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(name: str, ours: Timing, theirs: Timing, says: str, device: str = "cpu") -> Figure:
    """Seconds per step of two contestants; the CPU clock's ratio is added to the sentence."""
    cpu = f" By CPU time: {ours.cpu:.2f} s against {theirs.cpu:.2f} s, {theirs.cpu / ours.cpu:.1f}x."
    return Figure(
        name, ours.wall, theirs.wall, theirs.wall / ours.wall, "s", says + (cpu if device == "cpu" else "")
    )


def publish(section: str, command: str, figures: Sequence[Figure], about: str, record: bool) -> None:
    """Print the figures as JSON lines; with `record`, also write them into their section of RESULTS.md."""
    for figure in figures:
        print(figure.json(), flush=True)
    if record:
        write_section(RESULTS, section, _section(section, command, figures, about))


def _section(section: str, command: str, figures: Sequence[Figure], about: str) -> str:
    rows = [
        f"| `{f.figure}` | {_show(f.ours)} | {_show(f.theirs)} | {_show(f.ratio)} | {f.unit} | {f.says} |"
        for f in figures
    ]
    head = ["| figure | ours | theirs | ratio | unit | what it says |", "|---|---|---|---|---|---|"]
    return "\n".join([f"## {section}", "", f"`{command}`", "", machine(), "", about, "", *head, *rows])


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _show(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def log(text: str) -> None:
    """Progress goes to stderr: stdout holds figures only."""
    print(text, file=sys.stderr, flush=True)
