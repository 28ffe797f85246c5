"""Sources -> chunks of texts -> packed units, and the ledger that counts each unit once.

    records, in their order  ->  chunks of texts  ->  sequences  ->  packed rows  ->  units of `unit_rows` rows

A unit is the token rows of one forward pass. What it holds follows from the order of the records alone (sources as
listed, files sorted, rows as they come), never from files, blocks, actors or retries. Chunks are as small as to be read
ahead cheaply, and so large that a chunk's last row, the only one that may stay half empty, does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from seuf_ray.artifacts import DataSummary
from seuf_ray.attribution.bootstrap import Bootstrap, Sequences
from seuf_ray.config import DataConfig
from seuf_ray.data.batches import collate_packed, pack, units
from seuf_ray.data.rows import Tokenizer, stream_texts, tokenized
from seuf_ray.errors import said_of
from seuf_ray.passes import Batch

Record = dict[str, Any]

CHUNK_TEXTS, CHUNK_CHARACTERS = 4096, 2**18  # of one chunk; the text that goes beyond is its last
MAX_PIECES = 2**20  # of one text; an index is the text's number times this, plus the piece's
ACCOUNT = (
    "data",
    "chunk",
    "unit",
    "is_last_unit",
    "is_last_chunk",
    "num_texts",
    "num_bad",
    "first_bad",
    "share",
)


def read_chunks(data: str, sources: Sequence[str], config: DataConfig) -> Iterator[Record]:
    """The texts of one set in chunks: `data`, `chunk` (from 0), `texts`, `first_text` (its number in the set).

    Beside them `is_last_chunk`, `num_bad` malformed rows on the way to this chunk's end, `first_bad`, where the
    first one of the set is, and `share`, about how much of the set this chunk is (0 where that cannot be told).

    Raises:
        DataError: a source is missing or empty, or has more malformed rows than `config.max_bad_rows`.
    """
    readings = [stream_texts(source, config) for source in sources]
    first_text, counted, before = 0, 0, 0.0
    texts = _said_of(f"data.{data}", (text for reading in readings for text in reading))
    for chunk, (group, is_last) in enumerate(_chunked(texts)):
        num_bad = sum(reading.num_bad for reading in readings)
        share = sum(reading.share for reading in readings) / len(readings)
        yield {
            "data": data,
            "chunk": chunk,
            "is_last_chunk": is_last,
            "texts": group,
            "first_text": first_text,
            "num_bad": num_bad - counted,
            "first_bad": next((reading.first_bad for reading in readings if reading.num_bad), ""),
            "share": share - before,
        }
        first_text, counted, before = first_text + len(group), num_bad, share


def _said_of(key: str, texts: Iterable[str]) -> Iterator[str]:
    with said_of(key):
        yield from texts


def _chunked(texts: Iterable[str]) -> Iterator[tuple[list[str], bool]]:
    """(texts, whether no more follow) of each chunk; one text is read ahead."""
    group: list[str] = []
    size = 0
    for text in texts:
        if len(group) == CHUNK_TEXTS or size >= CHUNK_CHARACTERS:
            yield group, False
            group, size = [], 0
        group.append(text)
        size += len(text)
    yield group, True


def pack_chunk(chunk: Record, tokenizer: Tokenizer, sequence_length: int, unit_rows: int) -> Iterator[Record]:
    """The units of one chunk; one without tokens where it has none, so that the chunk is accounted for.

    A unit has the columns of `ACCOUNT`; `tokens`, those of all its sequences one after the other; and for each sequence
    `lengths`, `indices` (its number in the set, which names it to the bootstrap) and `rows` (the packed row it is in).
    """
    texts = tokenized(chunk["texts"], tokenizer, sequence_length)
    pieces = {
        (chunk["first_text"] + at) * MAX_PIECES + number: piece
        for at, found in enumerate(texts)
        for number, piece in enumerate(found)
    }
    indices = list(pieces)
    packed = pack([len(piece) for piece in pieces.values()], sequence_length)
    groups = units([[indices[i] for i in row] for row in packed], unit_rows) or [[]]
    for unit, rows in enumerate(groups):
        yield {
            **{name: chunk[name] for name in ("data", "chunk", "is_last_chunk", "first_bad")},
            "unit": unit,
            "is_last_unit": unit == len(groups) - 1,
            "num_bad": 0 if unit else chunk["num_bad"],
            "share": chunk["share"] / len(groups),
            **_contents(rows, pieces),
        }


def _contents(rows: list[list[int]], pieces: Mapping[int, tuple[int, ...]]) -> Record:
    indices = [index for row in rows for index in row]
    return {
        "num_texts": sum(index % MAX_PIECES == 0 for index in indices),
        "tokens": [token for index in indices for token in pieces[index]],
        "lengths": [len(pieces[index]) for index in indices],
        "indices": indices,
        "rows": [number for number, row in enumerate(rows) for _ in row],
    }


def first_tokens(records: Iterable[Record], max_tokens: int) -> Iterator[Record]:
    """The first units with `max_tokens` tokens together; the last of them is the last of its set."""
    total = 0
    for record in records:
        total += len(record["tokens"])
        if total >= max_tokens:
            yield {**record, "is_last_unit": True, "is_last_chunk": True}
            return
        yield record


def unit_batch(record: Record, bootstrap: Bootstrap, pad_id: int) -> tuple[Batch, Sequences] | None:
    """A unit as the model reads it, and whose tokens they are; None for a unit without any."""
    if not record["lengths"]:
        return None
    batch = collate_packed(record["tokens"], record["lengths"], record["rows"], pad_id)
    return batch, bootstrap.sequences(record["lengths"], record["indices"])


def account(record: Record) -> Record:
    """The accounting columns of a unit, which its result carries on."""
    return {name: record[name] for name in ACCOUNT}


class Ledger:
    """Which units of one set have come, in whatever order: each counts once, and none may be missing at the end.

    Memory is what arrives before its turn.
    """

    def __init__(self) -> None:
        self.num_texts = self.num_bad = 0
        self.first_bad = ""
        self.is_complete = False
        self._next = (0, 0)
        self._early: dict[tuple[int, int], tuple[bool, bool]] = {}

    def add(self, record: Record) -> bool:
        """Account for the unit of `record`; False where it has come before and must not count again."""
        name = (record["chunk"], record["unit"])
        if name < self._next or name in self._early:
            return False
        self.num_texts += record["num_texts"]
        self.num_bad += record["num_bad"]
        self.first_bad = self.first_bad or record["first_bad"]
        self._early[name] = (record["is_last_unit"], record["is_last_chunk"])
        self._advance()
        return True

    def _advance(self) -> None:
        while (ends := self._early.pop(self._next, None)) is not None:
            chunk, unit = self._next
            self._next = (chunk + 1, 0) if ends[0] else (chunk, unit + 1)
            self.is_complete = self.is_complete or all(ends)

    def __str__(self) -> str:
        """What is missing."""
        chunk, unit = self._next
        return (
            f"unit {unit} of chunk {chunk} is the first missing, {len(self._early)} units after it have come"
        )

    def summary(self, sources: Sequence[str], num_rows: int, num_tokens: int) -> DataSummary:
        """What the set came to; a row is a text, or a piece of a longer one."""
        return DataSummary(
            sources=list(sources),
            num_texts=self.num_texts,
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_bad_rows=self.num_bad,
            first_bad=self.first_bad,
        )
