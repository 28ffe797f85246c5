"""What one forward pass leaves behind, and means over a batch that may be spread over processes.

A loss sees `Forward`s only. Its means divide by the whole batch's counts, split evenly over the ranks:

    sum over ranks of  (local sum / (global count / R)) / R  =  global sum / global count

so averaging gradients over R ranks (what every data-parallel engine does) gives exactly the gradient of the mean
over the whole batch, however unevenly tokens fall on ranks. A mean of per-rank means would not.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.families import Scoring, Shape

Counts = tuple[float, float, float]  # num_tokens, num_sequences, num_routed, as in Forward


@dataclass(frozen=True)
class Batch:
    """Token rows as the model reads them.

    Attributes:
        ids: (B, T) token ids, padded on the right.
        attention: (B, T) True at real tokens.
        counted: (B, T) True at tokens whose log-probability counts (never the first of a row, never padding).
        segments: (B, T) number of the packed sequence that a token belongs to, within its row, -1 for padding; None:
            every row is one sequence. Tokens see their own sequence only, and count positions from its beginning.
        is_filler: the rows only keep a rank company in collective calls; nothing of them counts.
        key: names this batch, if it will come again with exactly these rows; what is constant for it can be kept.
    """

    ids: Tensor
    attention: Tensor
    counted: Tensor
    segments: Tensor | None = None
    is_filler: bool = False
    key: Hashable = None

    @property
    def routed(self) -> Tensor:
        """(B, T) True at tokens whose routing counts."""
        return torch.zeros_like(self.attention) if self.is_filler else self.attention

    @property
    def mask(self) -> Tensor:
        """What attention may see: (B, T) real tokens, or (B, 1, T, T) the earlier ones of the same packed sequence."""
        if self.segments is None:
            return self.attention
        same = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        return same.tril()  # padding sees padding: a row without any would make NaN

    @property
    def positions(self) -> Tensor | None:
        """(B, T) place of each token in its packed sequence; None: in its row."""
        if self.segments is None:
            return None
        index = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        starts = self.segments.diff(dim=1, prepend=self.segments[:, :1] - 1) != 0
        return index - torch.where(starts, index, 0).cummax(dim=1).values

    def filler(self) -> Batch:
        """The same rows, counting nothing; a masked-out row would make NaN in attention instead."""
        return replace(self, counted=torch.zeros_like(self.counted), is_filler=True)

    def named(self, *key: Hashable) -> Batch:
        """The same batch under a key."""
        return replace(self, key=key)

    def to(self, device: torch.device | str) -> Batch:
        names = [n for n in ("ids", "attention", "counted", "segments") if getattr(self, n) is not None]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class Forward:
    """What one pass over a batch leaves behind.

    Attributes:
        logps: (B, T-1) log-probability of token t+1 given the tokens up to t.
        mask: (B, T-1) True where that token counts.
        router_logits: layer -> (N, E), the N real tokens of the batch (padding never counts).
        router_choices: layer -> (N, K), the experts chosen for them, best first.
        hidden: layer -> (B, T, D), output of the decoder layers that a loss reads (before the final norm).
        router_inputs: layer -> (N, D), of the routers whose inputs are read, at the N real tokens.
        real: (B, T) True at the tokens of `hidden` that count.
        logits: (B, T-1, V) of each next token, where a loss reads them.
        tokens: (B, T-1) the tokens whose log-probabilities `logps` are.
        num_tokens, num_sequences, num_routed: counted tokens, rows with such a token, and real tokens of the whole
            batch over all ranks, divided by the number of ranks.

    A pass that was cut short (see `Reads.depth`) has NaN in `logps`: reading what was not computed stops a run.
    """

    logps: Tensor
    mask: Tensor
    router_logits: dict[int, Tensor] = field(default_factory=dict)
    router_choices: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    router_inputs: dict[int, Tensor] = field(default_factory=dict)
    real: Tensor | None = None
    logits: Tensor | None = None
    tokens: Tensor | None = None
    num_tokens: float = 0.0
    num_sequences: float = 0.0
    num_routed: float = 0.0

    def nll(self) -> Tensor:
        """Mean token NLL over counted tokens of the whole batch, scalar (open-unlearning's CE)."""
        return -self.mean_tokens(self.logps)

    def mean_tokens(self, values: Tensor) -> Tensor:
        """Mean of per-token `values` (B, T-1) over counted tokens."""
        return torch.where(self.mask, values, 0).sum() / self.num_tokens

    def mean_sequences(self, values: Tensor) -> Tensor:
        """Mean of per-sequence `values` (B,) over rows with a counted token."""
        return torch.where(self.mask.any(dim=1), values, 0).sum() / self.num_sequences

    def mean_routed(self, values: Tensor) -> Tensor:
        """Mean of per-token routing `values` (N,) over real tokens."""
        return values.sum() / self.num_routed

    def mean_hidden(self, values: Tensor) -> Tensor:
        """Mean of per-token `values` (B, T) over real tokens."""
        assert self.real is not None
        return torch.where(self.real, values, 0).sum() / self.num_routed

    def sequence_logps(self) -> Tensor:
        """(B,) summed log-probability of each row's counted tokens (the `S` of NPO, SimNPO and DPO)."""
        return torch.where(self.mask, self.logps, 0).sum(dim=1)


def flat_routing(logits: dict[int, Tensor], choices: dict[int, Tensor]) -> dict[str, Tensor]:
    """A pass's routing under one name for each tensor, to be kept; `by_layer` undoes it."""
    return {f"logits/{at}": t for at, t in logits.items()} | {f"choices/{at}": t for at, t in choices.items()}


def by_layer(flat: dict[str, Tensor], kind: str) -> dict[int, Tensor]:
    """The tensors called `kind`/LAYER, by layer."""
    named = {name.partition("/")[2]: tensor for name, tensor in flat.items() if name.startswith(f"{kind}/")}
    return {int(layer): tensor for layer, tensor in named.items()}


def restored(flat: dict[str, Tensor], batch: Batch, counts: Counts) -> Forward:
    """A pass over `batch` from what was kept of it: `logps`, and `logits`, `choices` and `hidden` by layer."""
    num_tokens, num_sequences, num_routed = counts
    return Forward(
        logps=flat["logps"],
        mask=batch.counted[:, 1:],
        router_logits=by_layer(flat, "logits"),
        router_choices=by_layer(flat, "choices"),
        hidden=by_layer(flat, "hidden"),
        real=batch.routed,
        tokens=batch.ids[:, 1:],
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        num_routed=num_routed,
    )


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, T-1) log-probability of each next token, in float32.

    Args:
        logits: (B, T, V) of the model.
        ids: (B, T) token ids.
    """
    return chosen_logps(logits[:, :-1], ids[:, 1:])


def chosen_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """(...) log-probability of `tokens` (...) under `logits` (..., V), in float32."""
    wide = logits.float()
    return wide.gather(-1, tokens[..., None]).squeeze(-1) - wide.logsumexp(dim=-1)


@dataclass(frozen=True)
class Targets:
    """What a plan means to an anchor.

    Attributes:
        experts: (layer, expert) pairs that keep the tokens; empty for the full-parameter baseline.
        routers: layers whose router is anchored.
        moe_layers: all layers with routed experts.
        scoring: how the family turns router logits into scores.
    """

    experts: tuple[tuple[int, int], ...]
    routers: tuple[int, ...]
    moe_layers: tuple[int, ...]
    scoring: Scoring

    @classmethod
    def of(cls, plan: UnlearningPlan, shape: Shape) -> Targets:
        """Of a model of this shape."""
        layers = sorted({layer for layer, _ in plan.experts}) or list(shape.moe_layers)
        return cls(tuple(plan.experts), tuple(layers), shape.moe_layers, shape.scoring)

    @property
    def layers_from_first(self) -> tuple[int, ...]:
        """MoE layers at or after the first target: layers below cannot drift."""
        return tuple(layer for layer in self.moe_layers if layer >= min(self.routers))

    def experts_of(self, layer: int) -> list[int]:
        return [expert for at, expert in self.experts if at == layer]
