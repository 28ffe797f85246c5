"""The matrix as a list of cells, and the store of those that are done: one JSON file each, named by a fingerprint.

A cell's fingerprint covers what its numbers depend on: what it says, how it is measured, the checkpoint, the tokenised
data, the attribution report, and the versions of the packages that compute; not the code of this package between two
versions, so whoever changes that takes another folder. A file is written aside and
renamed, so it holds a whole result or is not there; whoever runs the matrix again runs what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from seuf_ray.artifacts import Record, fingerprint, write_text
from seuf_ray.paper.methods import ALGORITHMS, FIRST, METHODS, ONLY_GA, ORIGINAL, fixed_rate
from seuf_ray.paper.settings import PaperSettings, Protocol

Result = dict[str, Any]  # of one cell: row, curve, robustness, seconds; plain JSON
PACKAGES = ("seuf-ray", "torch", "transformers", "peft")


class Cell(Record):
    """One run. `attacked` runs end with the robustness tests."""

    model: str
    forget: str
    method: str
    algorithm: str
    seed: int
    protocol: Protocol
    learning_rate: float
    steps: int
    evaluate_every: int
    attacked: bool = False

    @property
    def label(self) -> str:
        """Words for a person."""
        forget = self.forget.removeprefix("embedded:")
        return f"{self.protocol} {self.method} {self.algorithm} seed {self.seed} lr {self.learning_rate:.3g} ({forget})"

    @property
    def slug(self) -> str:
        """The beginning of its file name."""
        names = (self.protocol, self.model, self.forget, self.method, self.algorithm, str(self.seed))
        return "-".join(name.removeprefix("embedded:").replace("/", "_") for name in names)


def fixed_cells(settings: PaperSettings) -> tuple[list[Cell], list[Cell]]:
    """The fixed protocol: learning rates and steps are given, no early stop; what claims are made of, and the rest."""
    main = [name for name in settings.methods if name in FIRST]
    rest = [name for name in settings.methods if name not in FIRST]
    first = [
        cell
        for seed in settings.seeds
        for method in main
        for algorithm in settings.algorithms
        for cell in _fixed(settings, settings.model, method, algorithm, seed)
    ]
    return first, [*_ablations(settings, rest), *_others(settings)]


def _ablations(settings: PaperSettings, methods: list[str]) -> Iterator[Cell]:
    for algorithm in settings.algorithms:
        for method in methods:
            if method in ONLY_GA and algorithm != "ga":
                continue
            for seed in settings.seeds if algorithm in settings.whole else settings.seeds[:1]:
                yield from _fixed(settings, settings.model, method, algorithm, seed)


def _others(settings: PaperSettings) -> Iterator[Cell]:
    """Losses with other hyper-parameters, and other models."""
    for algorithm, methods in settings.varied.items():
        for method in methods:
            for seed in settings.seeds:
                yield from _fixed(settings, settings.model, method, algorithm, seed)
    for model in settings.other_models:
        for algorithm in settings.algorithms:
            for method in (ORIGINAL, *settings.other_methods):
                for seed in settings.seeds if algorithm in settings.whole else settings.seeds[:1]:
                    yield from _fixed(settings, model, method, algorithm, seed)


def _fixed(settings: PaperSettings, model: str, method: str, algorithm: str, seed: int) -> Iterator[Cell]:
    if method == ORIGINAL and (algorithm, seed) != (settings.algorithms[0], settings.seeds[0]):
        return  # nothing is done to it, so once is enough
    is_attacked = (model, seed) == (settings.model, settings.seeds[0]) and algorithm in settings.algorithms
    attacked = [ORIGINAL, *settings.robustness_methods] if settings.robustness_methods else []
    steps = settings.steps_of(algorithm)
    yield Cell(
        model=model,
        forget=settings.forget,
        method=method,
        algorithm=algorithm,
        seed=seed,
        protocol="fixed",
        learning_rate=fixed_rate(method, algorithm),
        steps=steps,
        evaluate_every=max(1, steps // 6),
        attacked=is_attacked and method in attacked,
    )


def planned(settings: PaperSettings) -> dict[str, int]:
    """How many cells each protocol has, apart from those that only choose a learning rate."""
    first, rest = fixed_cells(settings)
    rows = len(settings.matched_forget) * len(settings.matched_methods) * len(settings.algorithms)
    return {"fixed": len(first) + len(rest), "matched": rows * len(settings.seeds)}


def matched_cell(
    settings: PaperSettings,
    protocol: Protocol,
    forget: str,
    method: str,
    algorithm: str,
    seed: int,
    rate: float,
) -> Cell:
    """A run that ends once forget accuracy is down at the matched level."""
    return Cell(
        model=settings.model,
        forget=forget,
        method=method,
        algorithm=algorithm,
        seed=seed,
        protocol=protocol,
        learning_rate=rate,
        steps=settings.matched_steps,
        evaluate_every=4,
    )


class Store:
    """The cells that are done, in a folder.

    Args:
        folder: where the files are.
        made_from: what a cell depends on besides itself, by (model, forget set).
    """

    def __init__(self, folder: Path, made_from: dict[tuple[str, str], dict[str, Any]]) -> None:
        self.folder, self.made_from = folder, made_from
        self.packages = {name: version(name) for name in PACKAGES}

    def path(self, cell: Cell) -> Path:
        """Where the result of this cell is or will be."""
        return self.folder / f"{cell.slug}-{self.fingerprint(cell)[:12]}.json"

    def fingerprint(self, cell: Cell) -> str:
        """sha256 of everything that the cell depends on."""
        return fingerprint(
            {
                "cell": cell.model_dump(mode="json"),
                "overrides": [*METHODS[cell.method].overrides, *ALGORITHMS[cell.algorithm]],
                "made_from": self.made_from[cell.model, cell.forget],
                "packages": self.packages,
            }
        )

    def read(self, cell: Cell) -> Result | None:
        """The result, if the cell is done; a file that is not one is as good as none."""
        try:
            document: Result = json.loads(self.path(cell).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return document if document.get("fingerprint") == self.fingerprint(cell) else None

    def write(self, cell: Cell, result: Result) -> None:
        """Keep a result for good."""
        document = {"fingerprint": self.fingerprint(cell), "cell": cell.model_dump(mode="json"), **result}
        write_text(self.path(cell), json.dumps(document, indent=1, allow_nan=False) + "\n")
