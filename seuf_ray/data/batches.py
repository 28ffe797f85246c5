"""Rows -> batches: padding, packing, fixed units, the sampler, and one rank's share of a batch."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch

from seuf_ray.data.rows import Row
from seuf_ray.passes import Batch

T = TypeVar("T")


def collate(rows: Sequence[Row], pad_id: int, length: int | None = None) -> Batch:
    """A batch (B, T) padded on the right to the longest row, or to `length` (which no row may exceed)."""
    lengths = torch.tensor([len(row.ids) for row in rows])  # (B,)
    longest = int(lengths.max())
    length = longest if length is None else length
    assert longest <= length, f"a row of {longest} tokens does not fit into {length}"
    ids = torch.tensor([[*row.ids, *[pad_id] * (length - len(row.ids))] for row in rows])  # (B, T)
    position = torch.arange(length)
    attention = position < lengths[:, None]
    context = torch.tensor([row.num_context for row in rows])
    return Batch(ids, attention, attention & (position >= context[:, None]))


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which sequences share a row of `width` tokens, by index: best-fit decreasing, at most 11/9 of the fewest rows.

    The longest sequence goes first, each into the row where it leaves least room (Johnson, 1973). Of equals the earlier
    sequence and the earlier row come first, so the lengths alone decide.
    """
    assert max(lengths, default=0) <= width
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[index], 0))
        free, row = room.pop(at) if at < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    return rows


def collate_packed(tokens: Sequence[int], lengths: Sequence[int], rows: Sequence[int], pad_id: int) -> Batch:
    """A batch of packed rows, as wide as the fullest of them.

    Args:
        tokens: of all sequences, one after the other (N,).
        lengths: tokens of each of the S sequences, adding up to N.
        rows: (S,) the row that each lies in, ascending from 0.
        pad_id: fills rows up; masked everywhere.
    """
    sizes = torch.tensor(lengths)
    row = torch.tensor(rows).repeat_interleave(sizes)  # (N,) of each token
    filled = torch.bincount(row)  # (B,)
    column = torch.arange(len(row)) - (filled.cumsum(0) - filled)[row]
    segments = torch.full((len(filled), int(filled.max())), -1)
    ids = torch.full_like(segments, pad_id)
    segments[row, column] = torch.arange(len(sizes)).repeat_interleave(sizes)
    ids[row, column] = torch.tensor(tokens)
    real = segments >= 0
    return Batch(ids, real, real, segments)


def units(rows: Sequence[T], unit_rows: int) -> list[list[T]]:
    """Fixed groups of `unit_rows` rows in the global order; one forward pass each, wherever it runs."""
    return [list(rows[start : start + unit_rows]) for start in range(0, len(rows), unit_rows)]


def spread(rows: Sequence[T], most: int) -> list[T]:
    """At most `most` of `rows`, evenly spaced."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else list(rows)


class Sampler:
    """Which rows a step sees: fixed batches, visited in a new order each epoch.

    A batch's composition never changes, so what frozen layers compute for it can be kept over epochs and trials.
    Batches are as equal as they can be: their sizes differ by one row at most, and none is over `batch_size`.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        assert num_rows > 0 and batch_size > 0
        self.num_batches = -(-num_rows // batch_size)
        self.seed = seed
        order = self._permutation(num_rows, "rows")
        self._rows = [order[number :: self.num_batches] for number in range(self.num_batches)]
        self._cached: tuple[int, list[int]] = (-1, [])

    def batch(self, step: int) -> int:
        """The number of the batch at `step` (from 0), a pure function of (seed, step)."""
        epoch, place = divmod(step, self.num_batches)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._permutation(self.num_batches, f"epoch {epoch}"))
        return self._cached[1][place]

    def rows(self, number: int) -> list[int]:
        """Row indices of batch `number`."""
        return self._rows[number]

    def _permutation(self, size: int, purpose: str) -> list[int]:
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order: list[int] = torch.randperm(size, generator=generator).tolist()
        return order


def shard(indices: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Every `world_size`-th index from `rank` on: the shares make up the batch, and may be empty."""
    return list(indices[rank::world_size])


def share(rows: Sequence[Row], rank: int, world_size: int, pad_id: int) -> Batch:
    """One rank's rows of a batch; a rank without any gets a filler, because collective calls need every rank."""
    mine = shard(range(len(rows)), rank, world_size)
    return collate([rows[i] for i in mine], pad_id) if mine else collate(rows[:1], pad_id).filler()


def micro_batches(
    rows: Sequence[Row], rank: int, world_size: int, pad_id: int, size: int, *key: Hashable
) -> list[Batch]:
    """One rank's share of a batch in parts of at most `size` rows, named by `key`; as many parts on every rank."""
    width = size * world_size
    groups = [rows[i : i + width] for i in range(0, len(rows), width)]
    return [share(group, rank, world_size, pad_id).named(*key, size, at) for at, group in enumerate(groups)]
