"""Trials per hour on a resident base against the common way, a Tune function that loads the model in every trial.

    python benchmarks/search.py [--record]

Both run the same trials (few steps, few questions: what is measured is what surrounds them) through Ray Tune, one at a
time on one CPU, in one Ray session, each beginning with a process of its own; the clock runs from Tune's start to its
end. Ours resets one worker from trial to trial. Theirs imports, loads and starts anew each time, with the same loader
and the same loop. Turnaround is measured in one process on the large model: from the reset to where the trial's first
step begins, without the small evaluation of step 0, which is the trial's own; load time in the same process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import ray
import torch
from common import Figure, log
from ray import tune
from setting import saved_model
from transformers.utils.logging import disable_progress_bar

from seuf_ray import embedded, unlearning
from seuf_ray.artifacts import AttributionReport, DataSummary, LayerScores, provenance
from seuf_ray.config import validate
from seuf_ray.job import Job
from seuf_ray.model.moe import MoEModel
from seuf_ray.monitor import Monitor
from seuf_ray.search.resident import Base, Resident
from seuf_ray.search.schedule import Schedule, Trial
from seuf_ray.stages.search import QUIET, base_of, search
from seuf_ray.stages.session import session
from seuf_ray.stages.trials import read_trial, write_trial

LAYERS = 16  # of the large model: 1.1 GiB in float32


def make_job(model: str, folder: Path, trials: int) -> Job:
    """A search over the learning rate; rows, questions and steps are few."""
    values = {
        "output_dir": str(folder),
        "model": {"name": model},
        "data": {"max_rows": 8},
        "training": {"steps": 2, "evaluate_every": 2, "max_questions": 2, "batch_size": 4},
        "telemetry": {"every": 0, "anchor_gradient_every": 0},
        "search": {
            "space": {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}},
            "num_trials": trials,
            "max_concurrent": 1,
        },
    }
    return Job(validate(values))


def report_on(job: Job) -> AttributionReport:
    """A made-up report: the first expert of the last layer is the target."""
    shape = job.checkpoint.shape
    rows = {
        layer: [float(layer == shape.moe_layers[-1])] + [0.0] * (shape.num_experts - 1)
        for layer in shape.moe_layers
    }
    scores = [LayerScores(layer=at, affinity=r, router_score=r, token_share=r) for at, r in rows.items()]
    return AttributionReport(
        model=job.identity,
        provenance=provenance(0),
        score="affinity",
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        data=DataSummary(sources=["made up"], num_texts=1, num_rows=1, num_tokens=1),
        digest="0" * 64,
        layers=scores,
        warnings=[],
    )


def common_way(config: dict[str, Any], base: Base) -> None:
    """One trial of theirs: a function that Tune calls in a new process."""
    torch.set_num_threads(1)
    resident = Resident(base, load(base))
    for moment in resident.run(read_trial(config)):
        tune.report({"step": moment.step, "done": moment.record is not None})


def load(base: Base) -> MoEModel:
    """The model of a base, in this process."""
    from seuf_ray.checkpoint.folder import Checkpoint

    return MoEModel(Checkpoint(base.folder))


def run_theirs(job: Job, report: AttributionReport) -> None:
    """The same trials, each in a process of its own."""
    schedule = Schedule(job.config)
    trials = [schedule.searcher.ask(number) for number in range(schedule.total)]
    space = [write_trial(Trial(number, found, {})) for number, found in enumerate(trials)]
    trainable = tune.with_resources(tune.with_parameters(common_way, base=base_of(job, report)), {"CPU": 1})
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        tuner = tune.Tuner(
            trainable,
            param_space={"number": 0, "trial": tune.grid_search([values["trial"] for values in space])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=1, trial_dirname_creator=lambda trial: trial.trial_id
            ),
            run_config=tune.RunConfig(name="theirs", storage_path=folder, verbose=0),
        )
        assert tuner.fit().num_errors == 0


def run_ours(job: Job, report: AttributionReport) -> None:
    """The search stage as it is."""
    shutil.rmtree(job.config.output_dir, ignore_errors=True)
    records = search(job, report)
    assert all(record.status == "finished" for record in records), [record.why for record in records]
    assert len({record.worker for record in records}) == 1


def rates(name: str, model: str, folder: Path, given: argparse.Namespace) -> Figure:
    """Trials per hour of both, in turn; the best of each one's turns."""
    job = make_job(model, folder, given.trials)
    report = report_on(job)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(given.turns):
        for who, run in (("ours", run_ours), ("theirs", run_theirs)):
            started = time.perf_counter()
            run(job, report)
            seconds[who].append(time.perf_counter() - started)
            log(f"{name}, turn {turn + 1}: {who} {seconds[who][-1]:.1f} s for {given.trials} trials")
    ours, theirs = (3600 * given.trials / min(seconds[who]) for who in ("ours", "theirs"))
    parameters = f"{job.checkpoint.num_parameters / 1e6:.0f} M parameters"
    says = f"{parameters}; {given.trials} trials from Tune's start to its end; the ratio is ours / theirs."
    return Figure(f"trials_per_hour.{name}", ours, theirs, ours / theirs, "trials/h", says)


def turnarounds(model: str, folder: Path) -> list[Figure]:
    """Reset to first step, in one process, against loading."""
    job = make_job(model, folder, 1)
    base = base_of(job, report_on(job))
    loads = [_timed(lambda: load(base)) for _ in range(3)]
    resident, found = Resident(base, load(base)), []
    for number in range(8):
        found.append(_turnaround(resident, number))
    turnaround, loading = statistics.median(found[1:]), statistics.median(loads)
    share = turnaround / loading
    first = f"the first trial, whose constants are not cached yet, takes {found[0] * 1e3:.0f} ms"
    return [
        Figure(
            "turnaround_ms", turnaround * 1e3, loading * 1e3, 1 / share, "ms", f"Against loading; {first}."
        ),
        Figure("turnaround_share", share, None, None, "of load time", "Target at most 0.02."),
    ]


def _turnaround(resident: Resident, number: int) -> float:
    """Seconds from the reset to the first step, less those of the small evaluation."""
    clock = {"measure": 0.0, "step": 0.0}
    measure, take = Monitor.measure, unlearning.Steps.take

    def measured(self: Monitor) -> dict[str, float]:
        started = time.perf_counter()
        found = measure(self)
        clock["measure"] += time.perf_counter() - started if not clock["step"] else 0.0
        return found

    def taken(self: unlearning.Steps, step: int) -> tuple[dict[str, float], float]:
        clock["step"] = clock["step"] or time.perf_counter()
        return take(self, step)

    Monitor.measure, unlearning.Steps.take = measured, taken  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        for _ in resident.run(Trial(number, {"training.learning_rate": 1e-4 * (number + 1)}, {})):
            pass
    finally:
        Monitor.measure, unlearning.Steps.take = measure, take  # type: ignore[method-assign]
    return clock["step"] - started - clock["measure"]


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=12, help="of each contestant in a turn")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the large model")
    parser.add_argument("--record", action="store_true", help="write the section of RESULTS.md")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    os.environ.update(QUIET)
    # Ray's workers must find this file's functions.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    torch.set_num_threads(1)
    disable_progress_bar()
    with saved_model("qwen2_moe", given.layers, "cpu") as folder, tempfile.TemporaryDirectory() as out:
        for path in embedded.checkpoint("specialised").glob("tokenizer*"):
            shutil.copy(path, folder)
        figures = turnarounds(str(folder), Path(out) / "turnaround")
        with session(make_job("embedded:specialised", Path(out), 1).config.cluster):
            small = rates("embedded", "embedded:specialised", Path(out) / "embedded", given)
            large = rates("large", str(folder), Path(out) / "large", given)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    about = (
        f"The large model: qwen2_moe with {given.layers} layers, random weights, {size:.2f} GiB in float32, in "
        f"the page cache. Trials of 2 steps with 4 rows; 1 CPU; the faster of {given.turns} turns each."
    )
    command = " ".join(["python benchmarks/search.py", *sys.argv[1:]])
    common.publish("search", command, [small, large, *figures], about, given.record)
    ray.shutdown()


if __name__ == "__main__":
    main()
