"""Attribution against the ordinary way: tokens a second of actors and of the streamed engine, and how they grow.

    python benchmarks/attribution.py [--record]
    python benchmarks/big_model.py FOLDER && python benchmarks/attribution.py --big FOLDER [--record]

Actors run as in a job: Ray Data reads, packs and feeds them, and the driver adds up. Clocks run from the first results
to the last, so starting Ray and loading models is in no figure. The ordinary way is a loop over padded batches of
transformers' own model with `output_router_logits=True`. One torch thread each; oneDNN off. `--big` measures the
streamed engine instead, over a checkpoint that is larger than memory, in a process of its own, whose peak is read from
the kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import psutil
import torch
from common import Figure, log
from setting import saved_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from seuf_ray import embedded
from seuf_ray.attribution.bootstrap import Bootstrap
from seuf_ray.attribution.statistics import RoutingStatistics
from seuf_ray.attribution.streaming import HiddenStates, Unit, stream
from seuf_ray.attribution.units import Ledger, Record, first_tokens, pack_chunk, read_chunks, unit_batch
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import JobConfig, validate
from seuf_ray.data.rows import Row
from seuf_ray.job import Job
from seuf_ray.model.loading import Weights, load_tokenizer
from seuf_ray.stages import attribute as stage
from seuf_ray.stages.data import unit_dataset
from seuf_ray.stages.session import session

WARM_UP = 4  # results before the clock starts: every actor is at work by then
BATCH = 32  # rows of the ordinary loop


def job_of(model: str, folder: Path, tokens: int, actors: int = 1) -> Job:
    """Attribution of about `tokens` tokens of embedded facts by so many actors."""
    values = {
        "output_dir": str(folder),
        "model": {"name": model},
        "data": {"forget": str(_texts(folder, tokens)), "retain": "embedded:general", "max_rows": None},
        "attribution": {"num_actors": actors, "engine": "actors"},
        "cluster": {"num_workers": actors},
    }
    return Job(validate(values))


def _texts(folder: Path, tokens: int) -> Path:
    """A file of facts, again and again: about 17 tokens each."""
    facts, path = embedded.texts("chemistry"), folder / f"{tokens}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number in range(tokens // 17):
            file.write(json.dumps({"text": facts[number % len(facts)]}) + "\n")
    return path


@dataclass
class Clock(Ledger):
    """A ledger that notes when each result came, and with how many tokens."""

    arrivals: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def add(self, record: Record) -> bool:
        is_new = super().add(record)
        self.arrivals.append((time.perf_counter(), RoutingStatistics.from_record(record).num_tokens))
        return is_new

    @property
    def speed(self) -> float:
        """Tokens a second after the warm-up."""
        (start, _), *rest = self.arrivals[WARM_UP - 1 :]
        return sum(tokens for _, tokens in rest) / (rest[-1][0] - start)


def actors(job: Job) -> Clock:
    """The job's forget set through its actors."""
    sources = {"forget": job.config.data.forget}
    bootstraps = {name: Bootstrap.of(job.config.attribution, 0, "forget") for name in ("forget", "retain")}
    clocks = {"forget": Clock(), "retain": Clock()}
    units = unit_dataset(job.config, job.checkpoint.folder, sources)
    stage.actors(job, units, bootstraps, clocks)
    assert clocks["forget"].is_complete
    return clocks["forget"]


class Ordinary:
    """The ordinary loop: padded batches, the whole model, routing of every layer from its output."""

    def __init__(self, job: Job) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            job.checkpoint.folder, dtype=torch.float32
        ).eval()
        self.top_k, self.rows = job.checkpoint.shape.top_k, job.forget.rows

    @torch.no_grad()
    def run(self) -> float:
        """Tokens a second after a first batch."""
        batches = [self.rows[at : at + BATCH] for at in range(0, len(self.rows), BATCH)]
        self._batch(batches[0])
        started = time.perf_counter()
        for rows in batches[1:]:
            self._batch(rows)
        return sum(len(row.ids) for rows in batches[1:] for row in rows) / (time.perf_counter() - started)

    def _batch(self, rows: list[Row]) -> list[Tensor]:
        """By layer (E,) the sum over rows of their mean gates."""
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([[*row.ids] + [0] * (longest - len(row.ids)) for row in rows])
        mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
        found = self.model(ids, attention_mask=mask, output_router_logits=True, use_cache=False)
        real = mask.bool().flatten()
        owner = torch.arange(len(rows)).repeat_interleave(mask.sum(dim=1))
        share = 1.0 / mask.sum(dim=1)[owner, None]
        return [self._gates(logits[real], share) for logits in found.router_logits]

    def _gates(self, logits: Tensor, share: Tensor) -> Tensor:
        scores = logits.float().softmax(dim=-1)
        best = scores.topk(self.top_k, dim=-1)
        return (torch.zeros_like(scores).scatter(-1, best.indices, best.values) * share).sum(dim=0)


def actor_figures(folder: Path, rounds: int, layers: int, tokens: int) -> list[Figure]:
    """One actor against the loop, and two against one, in turn."""
    with saved_model("qwen2_moe", layers, "cpu") as model:
        for path in embedded.checkpoint("specialised").glob("tokenizer*"):
            (model / path.name).write_bytes(path.read_bytes())
        one, two = (job_of(str(model), folder / f"actors{n}", tokens, n) for n in (1, 2))
        loop, found = Ordinary(one), {"one": [], "two": [], "loop": []}
        with session(two.config.cluster):
            for number in range(rounds):
                log(f"actors: round {number + 1} of {rounds} ...")
                found["one"].append(actors(one).speed)
                found["two"].append(actors(two).speed)
                found["loop"].append(loop.run())
    alone, pair, plain = (statistics.median(found[name]) for name in ("one", "two", "loop"))
    return [
        Figure(
            "tokens_per_s.actors",
            alone,
            plain,
            alone / plain,
            "tokens/s",
            f"One actor against a loop over padded batches of {BATCH} rows with `output_router_logits=True`; ratio is "
            "ours / theirs (target 1.5).",
        ),
        Figure(
            "two_actors",
            pair,
            alone,
            pair / alone,
            "tokens/s",
            "Two actors against one, one thread each (ours: two; ratio is two / one, target 1.6); on two cores the "
            "driver and the tasks that feed them run there, too.",
        ),
    ]


def growth_figures(folder: Path, rounds: int, tokens: int) -> list[Figure]:
    """Ten times the tokens on the embedded model: time and memory."""
    small, large = (job_of("embedded:specialised", folder / f"x{n}", n * tokens) for n in (1, 10))
    seconds: dict[str, list[float]] = {"small": [], "large": []}
    memory: dict[str, list[float]] = {"small": [], "large": []}
    with session(small.config.cluster):
        for number in range(rounds):
            log(f"ten times: round {number + 1} of {rounds} ...")
            for name, job, times in (("small", small, 1), ("large", large, 10)):
                with peak_memory() as peak:
                    clock = actors(job)
                seconds[name].append(times * tokens / clock.speed)
                memory[name].append(peak[0] / 2**20)
    time_of, memory_of = (
        {k: statistics.median(v) for k, v in figure.items()} for figure in (seconds, memory)
    )
    return [
        Figure(
            "ten_times.time",
            time_of["large"],
            time_of["small"],
            time_of["large"] / time_of["small"],
            "s",
            f"{10 * tokens:,} tokens against {tokens:,}, by their speed after the first results (target 10.5).",
        ),
        Figure(
            "ten_times.memory",
            memory_of["large"],
            memory_of["small"],
            memory_of["large"] / memory_of["small"],
            "MiB",
            "Peak of what the driver and the actor have to themselves (target within 10 %).",
        ),
    ]


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Inside, a thread looks: the largest sum of unshared bytes of this process and of its actors."""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            peak[0] = max(peak[0], _unshared())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _unshared() -> float:
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            if process == own or "Attributor" in " ".join(process.cmdline()):
                total += process.memory_full_info().uss
        except psutil.Error:
            continue  # it has just ended
    return total


def streamed_figures(big: Path, tokens: int, dtype: str) -> list[Figure]:
    """The streamed engine over `big`, once: it reads the whole checkpoint."""
    log(f"streamed: {big} ...")
    command = [sys.executable, __file__, "--stream", str(big), "--tokens", str(tokens), "--dtype", dtype]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    size = sum(path.stat().st_size for path in big.glob("*.safetensors")) / 2**30
    says = (
        f"One run over {found['tokens']:,} tokens of a checkpoint of {size:.1f} GiB: {found['seconds']:.0f} s, "
        f"{found['read'] / 2**30:.1f} GiB read, computed in {dtype} by {found['threads']} threads"
    )
    return [
        Figure(
            "streamed.peak_gib",
            found["peak"] / 2**30,
            size,
            size / (found["peak"] / 2**30),
            "GiB",
            f"Peak resident memory of the process (target 6) against the checkpoint. {says}.",
        ),
        Figure(
            "streamed.tokens_per_s", found["tokens"] / found["seconds"], None, None, "tokens/s", f"{says}."
        ),
    ]


def run_streamed(folder: Path, tokens: int, dtype: str) -> None:
    """In a process of its own: print what the streamed engine took."""
    checkpoint = Checkpoint(folder)
    config = validate({"output_dir": "unused", "data": {"sequence_length": 256}})
    started = time.perf_counter()
    weights = Weights(checkpoint, getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as spill:
        hidden = HiddenStates(config.attribution.hidden_bytes, Path(spill))
        totals = stream(weights, _units(config, checkpoint, tokens), hidden, progress=_show)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(
        json.dumps(
            {
                "tokens": totals["forget"].num_tokens,
                "seconds": time.perf_counter() - started,
                "read": weights.bytes_read,
                "peak": peak,
                "threads": torch.get_num_threads(),
            }
        )
    )


def _show(done: int, layers: int, seconds: float) -> None:
    log(f"  layer {done} of {layers}, {seconds:.0f} s")


def _units(config: JobConfig, checkpoint: Checkpoint, tokens: int) -> Iterator[Unit]:
    tokenizer, bootstrap = load_tokenizer(checkpoint), Bootstrap.of(config.attribution, 0, "forget")
    records = (
        record
        for chunk in read_chunks("forget", config.data.forget, config.data)
        for record in pack_chunk(chunk, tokenizer, config.data.sequence_length, config.attribution.unit_rows)
    )
    for record in first_tokens(records, tokens):
        if (unit := unit_batch(record, bootstrap, 0)) is not None:
            yield "forget", *unit


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2, help="of the model that actors and loop run")
    parser.add_argument("--actor-tokens", type=int, default=40_000)
    parser.add_argument("--growth-tokens", type=int, default=60_000, help="and ten times as many")
    parser.add_argument("--big", type=Path, help="a folder of big_model.py, for the streamed engine")
    parser.add_argument("--tokens", type=int, default=4000, help="of the streamed engine")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the streamed engine; processors without bfloat16 arithmetic are several times slower in it",
    )
    parser.add_argument("--record", action="store_true", help="write the section of RESULTS.md")
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    disable_progress_bar()
    torch.backends.mkldnn.enabled = False
    if given.stream:
        run_streamed(given.stream, given.tokens, given.dtype)
        return
    command = " ".join(
        ["python benchmarks/attribution.py", *("FOLDER" if a == str(given.big) else a for a in sys.argv[1:])]
    )
    if given.big:
        figures = streamed_figures(given.big, given.tokens, given.dtype)
        common.publish("attribution.streamed", command, figures, "Written by big_model.py.", given.record)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        figures = actor_figures(Path(folder), given.rounds, given.layers, given.actor_tokens)
        figures += growth_figures(Path(folder), given.rounds, given.growth_tokens)
    about = (
        f"Actors and loop: qwen2_moe with {given.layers} layers, random weights, float32, {given.actor_tokens:,} "
        f"tokens of embedded facts in rows of 256 (the loop: one text a row); medians of {given.rounds} rounds in turn."
    )
    common.publish("attribution", command, figures, about, given.record)


if __name__ == "__main__":
    main()
