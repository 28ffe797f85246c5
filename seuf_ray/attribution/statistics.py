"""Exact routing statistics: int64 sums over sequences, and bootstrap replicates of the one that ranks.

    affinity_i     = sum over sequences of the mean over its tokens of g_i        (SEUF, Eq. 2)
    router_score_i = the same with the score s_i before the top-k choice
    slots_i        = number of (token, k) slots that chose expert i               (ESFT's token score)
    replicate_ri   = sum over sequences of w_rj x_ji,    w_rj ~ Poisson(1)        (`bootstrap.py`)

Every sum adds integers (fixed point, `routing.FIXED_POINT`), so any split of the sequences over units, actors and
layers, in any order, gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from seuf_ray import routing
from seuf_ray.attribution.bootstrap import Bootstrap, Integers, Sequences
from seuf_ray.errors import DataError
from seuf_ray.families import Scoring, Shape

MAX_SEQUENCES = 2**30  # times a fixed-point 1 is 2**62, and a replicate is about as large as its sum
_UNIT_TOKENS = 2**20  # times a fixed-point 1 is 2**52: up to there float64 adds integers exactly
_ARRAYS = ("affinity", "router_score", "slots", "replicates", "counts")


@dataclass(frozen=True)
class RoutingStatistics:
    """Exact sums over sequences and tokens, for L MoE layers, E experts and R replicates.

    Attributes:
        affinity: (L, E) fixed point, summed per-sequence mean gates.
        router_score: (L, E) fixed point, summed per-sequence mean scores.
        slots: (L, E) times a (token, k) slot chose the expert.
        replicates: (R, L, E) the replicated one of these, each sequence taken as often as the replicate draws it.
        counts: (R,) sequences (tokens for `token_share`) that each replicate drew.
        num_sequences, num_tokens: how many were seen.
    """

    affinity: Integers
    router_score: Integers
    slots: Integers
    replicates: Integers
    counts: Integers
    num_sequences: int
    num_tokens: int

    @classmethod
    def of(cls, arrays: Iterable[Integers], num_sequences: int, num_tokens: int) -> RoutingStatistics:
        """The five arrays, in order, and the two numbers."""
        affinity, router_score, slots, replicates, counts = arrays
        return cls(affinity, router_score, slots, replicates, counts, num_sequences, num_tokens)

    @classmethod
    def zero(cls, num_layers: int, num_experts: int, bootstrap: Bootstrap) -> RoutingStatistics:
        """What nothing adds up to."""
        empty = np.zeros((num_layers, num_experts), dtype=np.int64)
        replicates = np.zeros((bootstrap.replicates, num_layers, num_experts), dtype=np.int64)
        return cls(empty, empty, empty, replicates, np.zeros(bootstrap.replicates, dtype=np.int64), 0, 0)

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        """Both together, exactly.

        Raises:
            DataError: more than `MAX_SEQUENCES`, for which int64 would not be wide enough.
        """
        assert self.replicates.shape == other.replicates.shape and self.slots.shape == other.slots.shape
        num_sequences = self.num_sequences + other.num_sequences
        if num_sequences > MAX_SEQUENCES:
            raise DataError(
                f"{num_sequences:,} sequences are more than exact statistics can add up ({MAX_SEQUENCES:,}): "
                "set attribution.max_tokens"
            )
        arrays = (getattr(self, name) + getattr(other, name) for name in _ARRAYS)
        return RoutingStatistics.of(arrays, num_sequences, self.num_tokens + other.num_tokens)

    def to_record(self) -> dict[str, Any]:
        """Bytes and integers, as a row of a table between processes."""
        arrays = {name: getattr(self, name).astype("<i8").tobytes() for name in _ARRAYS}
        sizes = {"num_experts": self.slots.shape[1], "num_sequences": self.num_sequences}
        return {**arrays, **sizes, "num_tokens": self.num_tokens}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RoutingStatistics:
        """The statistics of a record; what else the record holds is left alone."""
        flat = {name: np.frombuffer(record[name], dtype="<i8").astype(np.int64) for name in _ARRAYS}
        size = (flat["slots"].size // record["num_experts"], record["num_experts"])
        sums = (flat[name].reshape(size) for name in _ARRAYS[:3])
        replicates = flat["replicates"].reshape(flat["counts"].size, *size)
        return cls.of((*sums, replicates, flat["counts"]), record["num_sequences"], record["num_tokens"])

    def digest(self) -> str:
        """sha256 of every integer: equal digests mean bit-identical statistics."""
        record = self.to_record()
        parts = (value if isinstance(value, bytes) else str(value).encode() for value in record.values())
        return hashlib.sha256(b"/".join(parts)).hexdigest()


def unit_statistics(
    logits: Mapping[int, Tensor], choices: Mapping[int, Tensor], sequences: Sequences, shape: Shape
) -> RoutingStatistics:
    """The statistics of one unit: every layer's, L of them.

    Args:
        logits: layer -> (N, E) router logits of the unit's N real tokens, sequence after sequence.
        choices: layer -> (N, K) chosen experts.
        sequences: whose tokens they are.
        shape: sizes and scoring of the model.
    """
    return stack(
        [
            layer_statistics(logits[layer], choices[layer], sequences, shape.scoring)
            for layer in shape.moe_layers
        ]
    )


def stack(layers: Sequence[RoutingStatistics]) -> RoutingStatistics:
    """The statistics of the same sequences in layer after layer, as one."""
    first = layers[0]
    assert all(layer.num_tokens == first.num_tokens for layer in layers)
    sums = (np.concatenate([getattr(layer, name) for layer in layers]) for name in _ARRAYS[:3])
    replicates = np.concatenate([layer.replicates for layer in layers], axis=1)
    return RoutingStatistics.of((*sums, replicates, first.counts), first.num_sequences, first.num_tokens)


def layer_statistics(
    logits: Tensor, choices: Tensor, sequences: Sequences, scoring: Scoring
) -> RoutingStatistics:
    """The statistics of one layer, L = 1.

    Args:
        logits: (N, E) router logits of N tokens, sequence after sequence, on any device.
        choices: (N, K) the experts chosen for them.
        sequences: whose tokens they are.
        scoring: how logits become scores.

    Raises:
        DataError: logits that are not finite.
    """
    assert len(logits) == sequences.num_tokens < _UNIT_TOKENS
    score = routing.scores(logits, scoring)
    if not score.isfinite().all():
        raise DataError(
            "router logits are not finite: the model overflows (model.dtype) or its weights are broken"
        )
    lengths, weights = (torch.from_numpy(a).to(logits.device) for a in (sequences.lengths, sequences.weights))
    found = _per_sequence(routing.to_fixed(score), choices, lengths)
    by_token = sequences.score == "token_share"
    replicated = weights.double() @ found["slots" if by_token else sequences.score].double()  # (R, E)
    sums = (_numpy(found[name].sum(dim=0, keepdim=True)) for name in _ARRAYS[:3])
    counts = sequences.weights @ (sequences.lengths if by_token else np.ones_like(sequences.lengths))
    arrays = (*sums, _numpy(replicated.to(torch.int64)[:, None]), counts)
    return RoutingStatistics.of(arrays, len(sequences.lengths), sequences.num_tokens)


def _per_sequence(score: Tensor, choices: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """(B, E) integers of each sequence, from the (N, E) fixed-point scores of its tokens."""
    size = (len(lengths), score.shape[1])
    owner = torch.arange(len(lengths), device=score.device).repeat_interleave(lengths)  # (N,)
    slots = (owner[:, None] * size[1] + choices).flatten()  # (N * K,) places in (B, E)
    gates = score.new_zeros(size).view(-1).index_add_(0, slots, score.gather(1, choices).flatten())
    scores = score.new_zeros(size).index_add_(0, owner, score)
    return {
        "affinity": (gates.view(size).double() / lengths[:, None]).round().to(torch.int64),
        "router_score": (scores.double() / lengths[:, None]).round().to(torch.int64),
        "slots": torch.bincount(slots, minlength=size[0] * size[1]).view(size),
    }


def _numpy(values: Tensor) -> Integers:
    return cast(Integers, values.cpu().numpy())
