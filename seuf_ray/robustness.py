"""Is it gone, or only hidden? What is done to an unlearned model to find out, each a function of models and rows.

    quantisation     expert weights rounded to int8 or int4, per output channel:  w -> s * round(w / s),
                     s = max |w| / (2^(bits-1) - 1) of the channel
    forced routing   the unlearned model's experts, chosen and weighed as the original's routers do
    relearning       a few steps of ordinary training on some of the facts; the others are asked for
    inversion        accuracy so far under chance that the model must know the answers to avoid them

Sources: relearning and quantisation as attacks on unlearning are arXiv 2406.13356 and 2410.16454; forced routing asks
whether knowledge stayed in an expert that is only no longer chosen (SEUF, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seuf_ray import evaluation
from seuf_ray.data.batches import Sampler, collate
from seuf_ray.data.rows import Row
from seuf_ray.engine import LocalEngine
from seuf_ray.evaluation import merge
from seuf_ray.model.moe import MoEModel
from seuf_ray.passes import Batch
from seuf_ray.quiz import Quiz

Run = Callable[[Batch], Tensor]  # (B,) summed log-probability of each row's counted tokens
Outputs = dict[int, tuple[Tensor, ...]]  # of routers, by layer
UNIT_QUESTIONS = 32


@torch.no_grad()
def accuracy(run: Run, quizzes: Sequence[Quiz], pad_id: int) -> float:
    """Mean over sources of the share of questions answered right."""
    found = []
    for quiz in quizzes:
        parts = [
            evaluation.accuracy(run(collate(unit.rows, pad_id)), unit.answers, unit.num_choices)
            for unit in quiz.units(UNIT_QUESTIONS)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = merge(total, part)
        found.append(total.mean)
    return sum(found) / len(found)


def plainly(model: MoEModel) -> Run:
    """The model as it is."""
    return lambda batch: model.forward(batch).sequence_logps()


# --- quantisation ---


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """`weight` (..., out, in) on a symmetric grid of 2^bits - 1 values for each output channel, in its own type."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=-1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale).round().clamp(-top, top) * scale


@contextmanager
def quantised_experts(model: MoEModel, bits: int) -> Iterator[None]:
    """Inside, every routed expert's weights are rounded."""
    names = [name for name in model.tensor_names() if model.family.parse_expert(name)]
    assert names, "a mixture of experts has experts"
    kept = model.exchange({name: round_to_nearest(model.view(name), bits) for name in names})
    try:
        yield
    finally:
        model.exchange(kept)


# --- forced routing ---


def forced(original: MoEModel, unlearned: MoEModel) -> Run:
    """The unlearned model with the original's routing of the same rows; it must be another object than the original."""

    def run(batch: Batch) -> Tensor:
        with _recorded(original) as outputs:
            original.forward(batch)
        with _replaced(unlearned, outputs):
            return unlearned.forward(batch).sequence_logps()

    return run


@contextmanager
def _recorded(model: MoEModel) -> Iterator[Outputs]:
    """Inside, collects what each router puts out."""
    outputs: Outputs = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
            outputs[layer] = output

        return hook

    with _hooked(model, keep):
        yield outputs


@contextmanager
def _replaced(model: MoEModel, outputs: Mapping[int, tuple[Tensor, ...]]) -> Iterator[None]:
    """Inside, each router puts out what it is told to."""

    def put(layer: int) -> Callable[..., Any]:
        return lambda *_: outputs[layer]

    with _hooked(model, put):
        yield


@contextmanager
def _hooked(model: MoEModel, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    hooks = [site.router.register_forward_hook(make(layer)) for layer, site in model.sites.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- relearning ---


def relearn(
    engine: LocalEngine, rows: Sequence[Row], steps: int, learning_rate: float, pad_id: int, seed: int
) -> None:
    """`steps` of ordinary training (mean token NLL, down) on `rows`, in batches of 32 drawn by `seed`."""
    sampler = Sampler(len(rows), 32, seed)
    for step in range(steps):
        batch = collate([rows[i] for i in sampler.rows(sampler.batch(step))], pad_id)
        engine.backward(engine.forward(batch, grad=True).nll())
        engine.step(learning_rate)


# --- inversion ---


def is_inverted(found: float, num_questions: int, num_choices: int = 4) -> bool:
    """Whether an accuracy is more than three standard errors under chance.

    With 4 choices and 236 questions: .25 - 3 sqrt(.25 * .75 / 236) = .165.
    """
    chance = 1 / num_choices
    return found < chance - 3 * math.sqrt(chance * (1 - chance) / num_questions)
