"""Routing statistics of a model larger than memory: one decoder layer at a time.

    h = embed(unit)                                             for every unit
    read the weights of a layer | h = layer(h) for every unit | drop them         up to the last router

Memory is one layer and the hidden states that `HiddenStates` keeps; time is one read of the tensors that a router
depends on: neither the head nor the experts of the last layer are read. Each unit goes through each layer in a forward
pass of its own, so the bits are those of `MoEModel.route`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from seuf_ray.attribution.bootstrap import Sequences
from seuf_ray.attribution.statistics import RoutingStatistics, layer_statistics, stack
from seuf_ray.errors import ConfigError
from seuf_ray.model.loading import Weights
from seuf_ray.model.spans import Spans
from seuf_ray.model.taps import RouterTaps, site_of, stopping_after
from seuf_ray.passes import Batch

Unit = tuple[
    str, Batch, Sequences
]  # its set, a batch, and the sequences that its real tokens are, row after row
Progress = Callable[[int, int, float], None]


class HiddenStates:
    """The hidden states of every unit between two layers: of those that come first in memory, of others in files.

    Args:
        max_bytes: in memory.
        spill: folder for the rest, of this process alone; made when it is needed, and left behind.
    """

    def __init__(self, max_bytes: int, spill: Path) -> None:
        self.max_bytes, self.spill = max_bytes, spill
        self.used = 0
        self._memory: dict[int, Tensor] = {}
        self._files: dict[int, Path] = {}

    def __getitem__(self, unit: int) -> Tensor:
        """(B, T, D) what was last set."""
        if unit in self._memory:
            return self._memory[unit]
        found: Tensor = torch.load(self._files[unit], weights_only=True)
        return found

    def __setitem__(self, unit: int, hidden: Tensor) -> None:
        """Keep `hidden` (B, T, D) instead of what the unit had before, which was as large.

        Raises:
            ConfigError: neither memory nor the disk has room for it.
        """
        if unit not in self._memory and unit not in self._files:
            self._place(unit, hidden.nbytes)
        if unit in self._memory:
            self._memory[unit] = hidden.cpu()
        else:
            self._write(self._files[unit], hidden)

    def _place(self, unit: int, size: int) -> None:
        if self.used + size <= self.max_bytes:
            self.used += size
            self._memory[unit] = torch.empty(0)
        else:
            self._files[unit] = self.spill / f"{unit}.pt"

    def _write(self, path: Path, hidden: Tensor) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(hidden.cpu(), path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            raise ConfigError(
                f"{path}: hidden states beyond attribution.hidden_bytes = {self.max_bytes} cannot be written here "
                f"({error})"
            ) from error


@torch.no_grad()
def stream(
    weights: Weights,
    units: Iterable[Unit],
    hidden: HiddenStates,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, RoutingStatistics]:
    """What `unit_statistics` of all units of each set add up to, to the bit.

    Args:
        weights: of the model; none is present afterwards.
        units: at least one; they stay in memory, at about 20 bytes a token.
        hidden: where hidden states are between two layers.
        device: where to compute.
        progress: called after each layer with (layers done, layers to do, seconds since the first began).

    Raises:
        ConfigError: a shard has become unreadable, or hidden states find no room.
        DataError: router logits are not finite.
    """
    passes = _Passes(weights, hidden, device)
    embedded, started = passes.embed(units), time.monotonic()
    found: dict[str, list[RoutingStatistics]] = {name: [] for name, *_ in embedded}
    for layer in range(passes.last + 1):
        for name, sums in passes.layer(layer, embedded).items():
            found[name].append(sums)
        if progress is not None:
            progress(layer + 1, passes.last + 1, time.monotonic() - started)
    return {name: stack(layers) for name, layers in found.items()}


class _Passes:
    """All units through one part of the model, whose weights are there only meanwhile."""

    def __init__(self, weights: Weights, hidden: HiddenStates, device: torch.device | str) -> None:
        self.weights, self.hidden, self.device = weights, hidden, device
        self.shape = weights.checkpoint.shape
        weights.drop(weights.parts)
        self.last = max(self.shape.moe_layers)
        self.spans = Spans(weights.module.to(device))
        self.sites = {layer: site_of(weights.module, layer) for layer in self.shape.moe_layers}
        self.taps = RouterTaps(self.sites)

    def embed(self, units: Iterable[Unit]) -> list[Unit]:
        """The first hidden states of all units; returns the units."""
        embedded = []
        with self.weights.present(self._under("model.embed_tokens."), self.device):
            for number, unit in enumerate(units):
                self.hidden[number] = self.spans.embed(unit[1].ids.to(self.device))
                embedded.append(unit)
        return embedded

    def layer(self, layer: int, units: list[Unit]) -> dict[str, RoutingStatistics]:
        """The hidden states of all units after one more layer; returns its sums by set, none for a dense layer."""
        found: dict[str, RoutingStatistics] = {}
        with self.weights.present(self._needed(layer), self.device):
            for number, (name, batch, sequences) in enumerate(units):
                self._run(layer, number, batch.to(self.device))
                if layer in self.sites:
                    real = batch.routed.flatten().to(self.device)
                    logits, choices = self.taps.logits[layer][real], self.taps.choices[layer][real]
                    sums = layer_statistics(logits, choices, sequences, self.shape.scoring)
                    found[name] = found[name] + sums if name in found else sums
        return found

    def _run(self, layer: int, number: int, batch: Batch) -> None:
        """One unit through one layer; nothing comes after the last router."""
        self.taps.clear()
        with stopping_after(self.sites[layer].router) if layer == self.last else nullcontext():
            states = self.hidden[number].to(self.device)
            self.hidden[number] = self.spans.run(layer, layer + 1, states, batch.mask, batch.positions)

    def _needed(self, layer: int) -> list[str]:
        """The weights of a layer, without the routed experts behind the last router (shared ones may come before)."""
        paths = self._under(f"model.layers.{layer}.")
        experts = self._under(f"model.layers.{layer}.mlp.experts.") if layer == self.last else []
        return [path for path in paths if path not in experts]

    def _under(self, prefix: str) -> list[str]:
        return [path for path in self.weights.parts if path.startswith(prefix)]
