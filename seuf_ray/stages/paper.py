"""The paper's matrix as Ray tasks: one cell a task, one CPU and one torch thread each.

The driver keeps `cluster.num_workers` tasks under way and writes each result as it comes, so a driver that is killed
loses only those, and the same command goes on with what is missing. Worker processes keep checkpoint, data and report
of the cells that they have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import ray
import torch

from seuf_ray.artifacts import AttributionReport, fingerprint
from seuf_ray.data.rows import Row
from seuf_ray.job import Job, prepare
from seuf_ray.outputs import claim
from seuf_ray.paper import tuning
from seuf_ray.paper.cells import Cell, Result, Store, fixed_cells, matched_cell
from seuf_ray.paper.experiment import Materials, base_config, run_cell
from seuf_ray.paper.methods import fixed_rate
from seuf_ray.paper.settings import PaperSettings
from seuf_ray.stages.attribute import attribute

Listener = Callable[[Cell, Result, int, int], None]  # a cell, its result, how many are done, of how many
Reports = dict[tuple[str, str], AttributionReport]
Trials = dict[
    tuple[str, str, str], dict[float, float | None]
]  # (forget, method, algorithm) -> rate -> utility


def prepare_matrix(settings: PaperSettings) -> dict[tuple[str, str], Job]:
    """The jobs of every (model, forget set), read and checked before Ray starts.

    Raises:
        ConfigError: a model, a source or an override is not usable.
    """
    pairs = [(settings.model, forget) for forget in (settings.forget, *settings.matched_forget)]
    pairs += [(model, settings.forget) for model in settings.other_models]
    return {pair: prepare(base_config(settings, *pair)) for pair in dict.fromkeys(pairs)}


def run_matrix(
    settings: PaperSettings, jobs: dict[tuple[str, str], Job], listener: Listener | None = None
) -> list[Result]:
    """The results of both protocols, those of cells that were done before included, in the matrix's order."""
    reports: Reports = {}
    for pair, job in jobs.items():
        claim(job.config)
        reports[pair] = attribute(job)
    store = Store(settings.output_dir / "cells", _made_from(settings, jobs, reports))
    runner = Runner(settings, reports, store, listener)
    first, rest = fixed_cells(settings)
    runner.run(first)
    tried = tune(settings, runner)
    chosen = [
        matched_cell(settings, "matched", *row, seed, tuning.best_rate(rates, fixed_rate(row[1], row[2])))
        for row, rates in tried.items()
        for seed in settings.seeds
        if len(rates) >= len(settings.rate_factors)  # all of them, but for only_done
    ]
    runner.run(chosen)
    runner.run(rest)
    return list(runner.done.values())


def tune(settings: PaperSettings, runner: Runner) -> Trials:
    """Every row of the matched protocol, with the learning rates tried for it, until no grid needs to grow."""
    rows = [
        (forget, method, algorithm)
        for forget in settings.matched_forget
        for method in settings.matched_methods
        for algorithm in settings.algorithms
    ]
    tried: Trials = {row: {} for row in rows}
    wanted = [(row, rate) for row in rows for rate in tuning.grid(settings, row[1], row[2])]
    while wanted:
        cells = [matched_cell(settings, "tune", *row, settings.seeds[0], rate) for row, rate in wanted]
        runner.run(cells)
        for (row, rate), cell in zip(wanted, cells, strict=True):
            if cell in runner.done:
                tried[row][rate] = runner.done[cell]["row"]["utility_at_level"]
        if not any(cell in runner.done for cell in cells):
            break  # with only_done, what is wanted now was never run
        more = [(row, tuning.next_rate(tried[row], settings.max_rates)) for row in rows]
        wanted = [(row, rate) for row, rate in more if rate is not None]
    return tried


class Runner:
    """Runs cells that are not done yet, `cluster.num_workers` at a time.

    Args:
        reports: attribution by (model, forget set).
        store: of results.
        listener: called on the driver for each cell that it runs.
    """

    def __init__(
        self, settings: PaperSettings, reports: Reports, store: Store, listener: Listener | None = None
    ) -> None:
        self.settings, self.store, self.listener = settings, store, listener
        self.reports = {pair: ray.put(report) for pair, report in reports.items()}
        self.done: dict[Cell, Result] = {}

    def run(self, cells: Sequence[Cell]) -> None:
        """Have `cells` in `done`, in their order; with `only_done` those that are."""
        found = {cell: kept for cell in cells if (kept := self.store.read(cell)) is not None}
        waiting = [] if self.settings.only_done else [cell for cell in cells if cell not in found]
        for cell, result in self._results(waiting):
            self.store.write(cell, result)
            found[cell] = result
            if self.listener is not None:
                self.listener(cell, result, len(found), len(cells))
        self.done |= {cell: found[cell] for cell in cells if cell in found}

    def _results(self, waiting: list[Cell]) -> Iterator[tuple[Cell, Result]]:
        """Each result as it comes; what fails names its cell."""
        running: dict[Any, Cell] = {}
        cluster, queue = self.settings.cluster, iter(waiting)
        task = ray.remote(_work).options(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)
        while True:
            while len(running) < cluster.num_workers and (cell := next(queue, None)) is not None:
                report = self.reports[cell.model, cell.forget]
                running[task.remote(self.settings.model_dump(mode="json"), cell, report)] = cell
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise RuntimeError(f"the cell {cell.label!r} failed") from error
            yield cell, result


def _work(settings: dict[str, Any], cell: Cell, report: AttributionReport) -> Result:
    """One cell, in a worker process."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    known = PaperSettings.model_validate(settings)
    job = _job(known.model_dump_json(include={"output_dir", "overrides"}), cell.model, cell.forget)
    return run_cell(cell, Materials(known, job, report))


@cache
def _job(settings: str, model: str, forget: str) -> Job:
    """Read once for each worker process; `settings` are those that matter."""
    return Job(base_config(PaperSettings.model_validate_json(settings), model, forget))


def _made_from(
    settings: PaperSettings, jobs: dict[tuple[str, str], Job], reports: Reports
) -> dict[tuple[str, str], dict[str, Any]]:
    """What the cells of each (model, forget set) depend on."""
    return {
        pair: {
            "model": job.identity.fingerprint,
            "attribution": reports[pair].digest,
            "data": fingerprint({"forget": _ids(job.forget.rows), "retain": _ids(job.retain.rows)}),
            "questions": fingerprint(
                {
                    quiz.source: [*_ids(quiz.rows), quiz.answers]
                    for quiz in job.forget_quizzes + job.utility_quizzes
                }
            ),
            "measuring": settings.measuring.model_dump(),
            "level": settings.matched_level,
            "overrides": settings.overrides,
        }
        for pair, job in jobs.items()
    }


def _ids(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    return [row.ids for row in rows]
