"""What the tables compare: each method is the same job with a few overrides, and one of two learning rates.

    full   the rate for training much of the model: everything, or all routed experts
    few    the rate for few parameters: every SEUF variant alike, routers, ESFT's experts, LoRA's adapters

A method that trains little needs larger steps, so `few` is five to ten times `full`. Both were set on another
checkpoint than the one that is shipped, and are the same for every seed; `matched` tunes them (see `tuning.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ORIGINAL = "original"  # the row of the model that nothing was done to
FIXED_RATES = {
    "full": {"ga": 3e-4, "gdiff": 5e-4, "npo": 5e-4, "rmu": 1e-3},
    "few": {"ga": 3e-3, "gdiff": 5e-3, "npo": 5e-3, "rmu": 1e-2},
}
# RMU's vector must be some multiple of the model's hidden states, whose mean length is 38 to 50 above the first layer
# here: with the default 20 one expert forgets nothing (.94). Of 20, 60 and 200 the last is the first at which full, one
# expert and top-1 of each layer all forget. Its retain weight is 1, as GDiff's and NPO's are; 10 is shown beside it.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "ga": ("algorithm.name=ga",),
    "gdiff": ("algorithm.name=gdiff",),
    "npo": ("algorithm.name=npo",),
    "rmu": ("algorithm.name=rmu", "algorithm.steering_coefficient=200", "algorithm.retain_weight=1"),
    "rmu_retain_10": (
        "algorithm.name=rmu",
        "algorithm.steering_coefficient=200",
        "algorithm.retain_weight=10",
    ),
}
PAPER_ALGORITHMS = ("ga", "gdiff", "npo", "rmu")


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        label: how people read it.
        overrides: of the job, without algorithm and training.
        rate: which of the two learning rates.
    """

    label: str
    overrides: tuple[str, ...]
    rate: Literal["full", "few"] = "few"


def _seuf(label: str, scope: str, top_m: int, *anchor: str) -> Method:
    return Method(
        label, (f"targets.scope={scope}", f"targets.top_m={top_m}", *(anchor or ("anchor.name=kl",)))
    )


def _baseline(label: str, scope: str, rate: Literal["full", "few"], *more: str) -> Method:
    return Method(label, (f"targets.scope={scope}", "anchor.name=none", *more), rate)


METHODS: dict[str, Method] = {
    ORIGINAL: _seuf("original", "model", 1),
    "full": _baseline("all parameters", "full", "full"),
    "lora": _baseline("LoRA", "lora", "few"),
    "esft": _baseline("ESFT", "esft", "few"),
    "experts": _baseline("all experts", "experts", "full"),
    "routers": _baseline("routers only", "routers", "few"),
    "random": _seuf("random expert", "random", 1),
    "seuf_one": _seuf("SEUF, one expert", "model", 1),
    "seuf_layer_top1": _seuf("SEUF, top-1 of each layer", "layer", 1),
    "seuf_layer_top2": _seuf("SEUF, top-2 of each layer", "layer", 2),
    "seuf_layer_top3": _seuf("SEUF, top-3 of each layer", "layer", 3),
    "seuf_same_layer": _seuf("SEUF, top-4 of the best layer", "same_layer", 4),
    "seuf_one_no_anchor": _seuf("SEUF, one expert, no anchor", "model", 1, "anchor.name=none"),
    "seuf_one_onehot": _seuf("SEUF, one expert, one-hot anchor", "model", 1, "anchor.name=onehot"),
    "seuf_one_frozen": _seuf("SEUF, one expert, frozen router", "model", 1, "anchor.name=frozen"),
    "seuf_layer_top1_no_anchor": _seuf(
        "SEUF, top-1 of each layer, no anchor", "layer", 1, "anchor.name=none"
    ),
    "seuf_layer_top1_onehot": _seuf(
        "SEUF, top-1 of each layer, one-hot anchor", "layer", 1, "anchor.name=onehot"
    ),
    "seuf_layer_top1_frozen": _seuf(
        "SEUF, top-1 of each layer, frozen router", "layer", 1, "anchor.name=frozen"
    ),
    "seuf_one_weight_0.1": _seuf(
        "SEUF, one expert, anchor weight .1", "model", 1, "anchor.name=kl", "anchor.weight=0.1"
    ),
    "seuf_one_weight_10": _seuf(
        "SEUF, one expert, anchor weight 10", "model", 1, "anchor.name=kl", "anchor.weight=10"
    ),
}
MAIN = ("full", "lora", "esft", "seuf_one", "seuf_layer_top1")
WEIGHTS = {0.0: "seuf_one_no_anchor", 0.1: "seuf_one_weight_0.1", 1.0: "seuf_one", 10.0: "seuf_one_weight_10"}
ONLY_GA = ("seuf_one_weight_0.1", "seuf_one_weight_10")
FIRST = (*MAIN, ORIGINAL, "random", "routers")  # what claims are made of: run first, with every seed


def fixed_rate(method: str, algorithm: str) -> float:
    """The learning rate of the fixed protocol."""
    return FIXED_RATES[METHODS[method].rate][algorithm.split("_")[0]]
