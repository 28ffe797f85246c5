"""How often each bootstrap replicate draws a sequence: Poisson(1) weights that depend on no order.

    w_rj ~ Poisson(1),   a pure function of the seed, the replicate r and the index j of the sequence in its set

So replicates are as additive as plain sums. The Poisson bootstrap is that of Chamandy et al., "Estimating Uncertainty
for Massive Data Streams" (2012), the hash is SplitMix64's finaliser (Steele et al., 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import factorial
from typing import Literal

import numpy as np
import numpy.typing as npt

from seuf_ray.config import AttributionConfig

Integers = npt.NDArray[np.int64]
Replicated = Literal["affinity", "router_score", "token_share"]

_TERMS = [Fraction(1, factorial(k)) for k in range(20)]
# P(w <= k) of Poisson(1) as 64-bit thresholds, in exact arithmetic: the same on every machine
_POISSON = np.array([int(2**64 * part / sum(_TERMS)) for part in accumulate(_TERMS[:-1])], dtype=np.uint64)


@dataclass(frozen=True)
class Sequences:
    """B sequences whose N tokens lie one after the other.

    Attributes:
        lengths: (B,) tokens of each.
        weights: (R, B) how often each bootstrap replicate draws each of them.
        score: what the replicates are sums of.
    """

    lengths: Integers
    weights: Integers
    score: Replicated

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Bootstrap:
    """Which replicates are kept: small enough to be sent to every actor.

    Attributes:
        seed: 64 bits; forget and retain set have different ones.
        replicates: R, 0 for none.
        score: what is replicated.
    """

    seed: int = 0
    replicates: int = 0
    score: Replicated = "affinity"

    @classmethod
    def of(cls, config: AttributionConfig, seed: int, data: Literal["forget", "retain"]) -> Bootstrap:
        """What a job's ranking score needs; the retain set is only replicated where it takes part in the score."""
        own = int.from_bytes(hashlib.sha256(f"{seed}/bootstrap/{data}".encode()).digest()[:8], "big")
        if config.score == "contrast":
            return cls(own, config.bootstrap, "affinity")
        return cls(own, config.bootstrap if data == "forget" else 0, config.score)

    def weights(self, indices: Sequence[int]) -> Integers:
        """(R, B) Poisson(1) weights of the sequences with these indices."""
        replicate = _mixed(np.arange(self.replicates, dtype=np.uint64) + np.uint64(self.seed))
        uniform = _mixed(replicate[:, None] ^ _mixed(np.asarray(indices, dtype=np.uint64)))
        return np.searchsorted(_POISSON, uniform, side="right").astype(np.int64)

    def sequences(self, lengths: Sequence[int], indices: Sequence[int]) -> Sequences:
        """Sequences as `layer_statistics` takes them.

        Args:
            lengths: tokens of each, in the order of their tokens.
            indices: the index of each in its set, in whatever order they come: it names the sequence to the bootstrap.
        """
        assert len(lengths) == len(indices) and min(lengths, default=1) > 0
        return Sequences(np.asarray(lengths, dtype=np.int64), self.weights(indices), self.score)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits of each of `values` (SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
