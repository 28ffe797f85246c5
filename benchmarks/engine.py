"""The engine against the ordinary way: seconds and bytes of one training step of SEUF, and what its parts cost.

    python benchmarks/engine.py [--record]                                   the CPU figures of RESULTS.md
    python benchmarks/engine.py --device cuda --shape deepseek_v2_lite --layers 6

The model is a real architecture with seeded random weights (qwen2_moe: 12 layers, hidden 512, 32 experts, top-4); all
get the same random rows. Ours trains one expert of the middle layer and its router with the KL anchor and default
telemetry, a quarter of the batch at a time; its batch comes again in every step, so prefix and reference pass come
from the cache (`prefix_cache` says what the first time costs). `peers` says what each peer does. One torch thread: on
two cores that other jobs use too, two threads mostly wait for each other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import common
import peers
import torch
from common import Figure, Timing, compare, interleaved, log
from ours import NPO, RMU, Ours, Step
from setting import SHAPES, Setting, control, saved_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from seuf_ray.config import ClusterConfig, EngineConfig, TelemetryConfig

PAIRS = {  # figure -> ours, theirs, what it says
    "ga_whole": ("ga whole", "full ga", "Ours with the whole batch at once, which takes more memory."),
    "ga": (
        "ga",
        "full ga",
        "GA with the anchor, against GA on all parameters (target 3x): half of the layers lie under the target and are "
        "cached; a lower target gains less, and a batch's first visit costs what `prefix_cache` says. AdamW is about "
        "a third of the peer's step at 512 tokens; at 2,048 (`--rows 16 --length 128`) the ratio was 3.4.",
    ),
    "ga_layer": (
        "ga layer",
        "full ga",
        "One expert in each layer: the lowest target is the first layer, so only the original's answer is cached.",
    ),
    "npo": (
        "npo",
        "full npo",
        "The reference pass comes from the cache, against a second model that runs in every step (target 4x).",
    ),
    "rmu": (
        "rmu",
        "full rmu",
        "Two passes of the target layer alone on cached prefixes, against three complete forward passes (target 10x).",
    ),
    "lora": (
        "ga",
        "lora",
        "Against rank 8 on attention and all fused experts, for which peft materialises W + BA of every expert.",
    ),
    "lora_attention": ("ga", "lora attention", "Against rank 8 on attention only, the cheapest LoRA."),
    "esft": (
        "ga",
        "esft",
        "Against masked gradients of the layer's whole expert tensors: the peer, too, has no backward pass below the "
        "target, so what is gained is the cached prefix.",
    ),
}

MEMORY = {  # whose peak is measured, and our engine's settings; None: as everywhere here
    "ours": None,
    "checkpointing": EngineConfig(gradient_checkpointing=True),
    "whole": EngineConfig(),
    "layer": None,
    "full": None,
}


def steps_figures(setting: Setting) -> list[Figure]:
    """Ours against the peers, all in one run."""
    ours = Ours(setting)
    arguments = (setting.folder, setting.device, setting.dtype)
    full, forget, retain = peers.Full(*arguments), setting.ids(0), setting.ids(1)
    wanted = control(full.reference.config.hidden_size, setting)
    adapted, attention = peers.lora(*arguments, experts=True), peers.lora(*arguments, experts=False)
    masked = peers.esft(*arguments, *setting.target)
    contestants: dict[str, Step] = {
        "ga": ours.step(),
        "ga whole": Ours(setting, config=EngineConfig()).step(),
        "ga layer": Ours(setting, every_layer=True).step(),
        "full ga": lambda: full.ga(forget),
        "npo": ours.step(NPO),
        "full npo": lambda: full.npo(forget),
        "rmu": ours.step(RMU),
        "full rmu": lambda: full.rmu(forget, retain, wanted, setting.target[0]),
        "lora": lambda: adapted(forget),
        "lora attention": lambda: attention(forget),
        "esft": lambda: masked(forget),
    }
    log("steps: ours and peers in turn ...")
    found = interleaved(contestants, setting.rounds, setting.device)
    return [*_step_figures(found, setting.device), _state(ours, full)]


def _step_figures(found: dict[str, Timing], device: str) -> list[Figure]:
    return [
        compare(f"step.{name}", found[ours], found[theirs], says, device)
        for name, (ours, theirs, says) in PAIRS.items()
    ]


def _state(ours: Ours, full: peers.Full) -> Figure:
    mine = peers.state_bytes(ours.engine.parameters(), ours.engine.optimizer)
    theirs = peers.state_bytes(full.trainer.parameters, full.trainer.optimizer)
    says = (
        "Gradients and Adam's moments; the ratio is ours / theirs (target under 0.01). Besides, ours keeps a float32 "
        "copy of the plan's tensors."
    )
    return Figure("trainable_state", mine, theirs, mine / theirs, "bytes", says)


def parts_figures(setting: Setting) -> list[Figure]:
    """What the anchor, telemetry and a cache miss add to our step; by CPU time, whose noise is far smaller."""
    ours = Ours(setting)
    off = TelemetryConfig(every=0, anchor_gradient_every=0)
    contestants = {
        "hit": ours.step(telemetry=off),
        "miss": ours.missing(ours.step(telemetry=off)),
        "no anchor": ours.step(anchor="none", telemetry=off),
        "telemetry": ours.step(telemetry=TelemetryConfig(every=1, anchor_gradient_every=0)),
        "gradient": ours.step(telemetry=TelemetryConfig(every=0, anchor_gradient_every=1)),
    }
    log("parts: hit, miss, without anchor, with telemetry ...")
    found = interleaved(contestants, 2 * setting.rounds, setting.device)
    clock = {name: timing.wall if setting.device == "cuda" else timing.cpu for name, timing in found.items()}
    hit = clock["hit"]
    looks = clock["telemetry"] - hit + (clock["gradient"] - hit) / 10
    return [
        _share("anchor_share", hit - clock["no anchor"], hit, "KL anchor with its reference cached"),
        _share("telemetry_share", looks, hit + looks, "defaults: routing every step, gradient every tenth"),
        compare(
            "prefix_cache",
            found["hit"],
            found["miss"],
            "A step whose batch was seen before, against one that computes and stores prefix and reference.",
            setting.device,
        ),
    ]


def _share(name: str, part: float, whole: float, what: str) -> Figure:
    return Figure(
        name,
        part / whole,
        None,
        None,
        "share of a step",
        f"{what}; difference of two medians of CPU time ({part * 1e3:.0f} ms), so about ±0.02.",
    )


def memory_figures(setting: Setting, arguments: list[str]) -> list[Figure]:
    """Peak memory of a process that loads and takes three steps, over the bytes of the weights."""
    found = {}
    for kind in MEMORY:
        log(f"memory: {kind} ...")
        command = [sys.executable, __file__, *arguments, "--folder", str(setting.folder), "--memory", kind]
        found[kind] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    weights = found["ours"]["weights"]
    ours, less, whole, layer, full = (found[kind]["peak"] / weights for kind in MEMORY)
    says = (
        f"GA; peak of the process less its size after imports, over {weights / 2**20:,.0f} MiB of weights (target "
        f"1.15). Loading alone peaks at {found['ours']['loaded'] / weights:.2f}; the rest is what layers keep "
        f"for the backward pass: {whole:.2f} with the whole batch at once, {less:.2f} with checkpointing; {layer:.2f} "
        "for one expert in each layer, a quarter of the batch at a time as here."
    )
    return [Figure("peak_memory_over_weights", ours, full, full / ours, "weights", says)]


def measure_memory(kind: str, setting: Setting) -> None:
    """In a process of its own: print peak and weights in bytes."""
    with torch.device("meta"):  # imports the architecture's code
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(setting.folder))
    baseline = _memory("VmRSS", setting.device)
    if kind == "full":
        full, ids = peers.Full(setting.folder, setting.device, setting.dtype, reference=False), setting.ids(0)
        model: Any = full.trainer.model
        loaded, step = _memory("VmHWM", setting.device), lambda: full.ga(ids)
    else:
        ours = Ours(setting, config=MEMORY[kind], every_layer=kind == "layer")
        model, loaded = ours.engine.model.module, _memory("VmHWM", setting.device)
        step = ours.step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for _ in range(3):
        step()
    peak = _memory("VmHWM", setting.device)
    print(json.dumps({"peak": peak - baseline, "loaded": loaded - baseline, "weights": weights}))


def _memory(key: Literal["VmRSS", "VmHWM"], device: str) -> int:
    """Bytes now or at the peak: of this process, or of the accelerator."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if key == "VmHWM" else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def ranks_figures(setting: Setting) -> list[Figure]:
    """One process against two with the experts sharded between them; one thread each."""
    if setting.device == "cuda":
        log("ranks: skipped, it needs several accelerators")
        return []
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    import distributed

    log("ranks: one, then two processes ...")
    one, two = (max(distributed.run(_rank, size, setting), key=lambda t: t.wall) for size in (1, 2))
    says = (
        "GA, the same batch: 2 gloo ranks with expert parallel size 2, against 1 rank before them; 2 would be "
        f"ideal on two free cores. CPU time of a rank: {two.cpu:.2f} s against {one.cpu:.2f} s."
    )
    return [Figure("ranks", two.wall, one.wall, one.wall / two.wall, "s", says)]


def _rank(setting: Setting) -> Timing:
    """A step on this rank."""
    torch.backends.mkldnn.enabled = False
    size = torch.distributed.get_world_size()
    cluster = ClusterConfig(num_workers=size, expert_parallel_size=size) if size > 1 else None
    return interleaved({"step": Ours(setting, cluster).step()}, setting.rounds)["step"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda computes in bfloat16")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2_moe")
    parser.add_argument("--layers", type=int, help="decoder layers; default: the shape's own")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contestant")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; more wait for each other on busy cores"
    )
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--record", action="store_true", help="write the section of RESULTS.md")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=list(MEMORY), help=argparse.SUPPRESS)
    return parser.parse_args()


FIGURES: dict[str, Callable[[Setting], list[Figure]]] = {
    "memory": lambda setting: memory_figures(setting, _passed_on(sys.argv[1:])),
    "steps": steps_figures,
    "parts": parts_figures,
    "ranks": ranks_figures,
}


def _passed_on(argv: list[str]) -> list[str]:
    """The arguments that a process which measures memory needs too."""
    return [argument for argument in argv if argument != "--record"]


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    torch.backends.mkldnn.enabled = False
    disable_progress_bar()
    saved = contextlib.nullcontext(given.folder)
    with saved if given.folder else saved_model(given.shape, given.layers, given.device) as folder:
        config = AutoConfig.from_pretrained(folder)
        sizes = (given.rows, given.length, given.rounds, config.vocab_size)
        setting = Setting(folder, given.device, config.num_hidden_layers, *sizes)
        if given.memory:
            measure_memory(given.memory, setting)
            return
        figures = [figure for name in given.figures for figure in FIGURES[name](setting)]
    command = " ".join(["python benchmarks/engine.py", *sys.argv[1:]])
    common.publish("engine", command, figures, _about(given, setting), given.record)


def _about(given: argparse.Namespace, setting: Setting) -> str:
    return (
        f"{given.shape} with {setting.layers} layers, random weights, {setting.dtype}; {given.rows} rows of "
        f"{given.length} tokens; target (layer, expert) {setting.target}; torch threads: {given.threads}; oneDNN off; "
        f"medians of {given.rounds} steps taken in turn after a warm-up."
    )


if __name__ == "__main__":
    main()
