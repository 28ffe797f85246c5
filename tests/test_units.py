"""Packed units: what they hold follows from the order of the records alone, and a ledger counts each of them once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seuf_ray.attribution.bootstrap import Bootstrap
from seuf_ray.attribution.units import (
    Ledger,
    Record,
    account,
    first_tokens,
    pack_chunk,
    read_chunks,
    unit_batch,
)
from seuf_ray.checkpoint.folder import Checkpoint, resolve
from seuf_ray.config import DataConfig
from seuf_ray.data.batches import collate_packed, pack
from seuf_ray.embedded import texts as embedded_texts
from seuf_ray.errors import DataError
from seuf_ray.model.moe import load_tokenizer

TEXTS = embedded_texts("chemistry")[:300]


class TestPacking:
    def test_the_longest_first_each_where_it_leaves_least_room(self) -> None:
        """Width 10, lengths 6 3 5 4 2: 6 | 5 | 4 joins the 6 (0 left) | 3 joins the 5 (2 left) | 2 fills that row."""
        assert pack([6, 3, 5, 4, 2], 10) == [[0, 3], [2, 1, 4]]

    @given(st.lists(st.integers(1, 40), max_size=80))
    @settings(max_examples=100, deadline=None)
    def test_every_sequence_lies_in_one_row_that_holds_it(self, lengths: list[int]) -> None:
        """And no two rows could be one: a row that is half empty has no second of its kind beside it."""
        rows = pack(lengths, 40)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        sizes = [sum(lengths[index] for index in row) for row in rows]
        assert all(0 < size <= 40 for size in sizes) and sum(size <= 20 for size in sizes) <= 1

    def test_a_batch_knows_its_sequences(self) -> None:
        """Rows of 2 + 1 tokens, and of 2: one token of padding."""
        batch = collate_packed([5, 6, 7, 8, 9], [2, 1, 2], [0, 0, 1], pad_id=0)
        assert batch.ids.tolist() == [[5, 6, 7], [8, 9, 0]]
        assert batch.segments is not None and batch.segments.tolist() == [[0, 0, 1], [2, 2, -1]]
        assert batch.positions is not None and batch.positions.tolist() == [[0, 1, 0], [0, 1, 0]]
        assert batch.attention.tolist() == [[True] * 3, [True, True, False]]
        seen = batch.mask[0, 0].tolist()
        assert seen == [[True, False, False], [True, True, False], [False, False, True]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Checkpoint(resolve("embedded:specialised", None)))


def units_of(tokenizer: Any, sources: list[str], **config: Any) -> list[Record]:
    chunks = read_chunks("forget", sources, DataConfig(**config))
    return [unit for chunk in chunks for unit in pack_chunk(chunk, tokenizer, 64, 4)]


def write(folder: Path, parts: int, kind: str) -> list[str]:
    """The texts in `parts` files of one folder."""
    folder.mkdir()
    size = -(-len(TEXTS) // parts)
    for number in range(parts):
        mine = TEXTS[number * size : (number + 1) * size]
        if kind == "parquet":
            pq.write_table(pa.table({"text": mine}), folder / f"{number}.parquet", row_group_size=17)
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in mine)
            (folder / f"{number}.jsonl").write_text(lines)
    return [str(folder)]


def test_units_do_not_know_files(tokenizer: Any, tmp_path: Path) -> None:
    """1, 3 and 7 files, JSON lines and parquet, one source or two: the same units, token for token."""
    layouts = [(1, "jsonl"), (3, "jsonl"), (7, "parquet")]
    found = [units_of(tokenizer, write(tmp_path / f"{n}{kind}", n, kind)) for n, kind in layouts]
    assert found[0] == found[1] == found[2]
    files = sorted(str(path) for path in (tmp_path / "3jsonl").iterdir())
    assert units_of(tokenizer, files) == found[0]
    lengths = [length for unit in found[0] for length in unit["lengths"]]
    assert sum(unit["num_texts"] for unit in found[0]) == 300 and len(lengths) == 300
    assert [len(unit["tokens"]) > 0.9 * 4 * 64 for unit in found[0][:-1]] == [True] * (len(found[0]) - 1)


def test_what_a_unit_holds_is_its_sequences_tokens(tokenizer: Any, tmp_path: Path) -> None:
    (unit, *_), eos = units_of(tokenizer, write(tmp_path / "x", 1, "jsonl")), [tokenizer.eos_token_id]
    read = unit_batch(unit, Bootstrap(seed=1, replicates=3), 0)
    assert read is not None
    batch, sequences = read
    flat = batch.ids[batch.attention].tolist()
    assert flat == unit["tokens"] and sequences.weights.shape == (3, len(unit["lengths"]))
    start = 0
    for length, index in zip(unit["lengths"], unit["indices"], strict=True):
        ids = tokenizer(TEXTS[index >> 20], add_special_tokens=False)["input_ids"]
        assert flat[start : start + length] == list(ids) + eos
        start += length
    assert batch.ids.shape[1] <= 64 and torch.equal(batch.attention, batch.counted)


def test_a_set_ends_with_the_unit_that_reaches_the_tokens_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    units = units_of(tokenizer, write(tmp_path / "x", 1, "jsonl"))
    sizes = [len(unit["tokens"]) for unit in units]
    found = list(first_tokens(iter(units), sizes[0] + 1))
    assert [unit["unit"] for unit in found] == [0, 1]
    ledger = Ledger()
    assert all(ledger.add(account(unit)) for unit in found) and ledger.is_complete
    assert list(first_tokens(iter(units), 10**9)) == units


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "max_rows", "csv", "json"])
def test_units_say_how_much_of_their_set_they_are(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """Thousands of texts in several chunks: shares add up to 1, and each is about that of its tokens."""
    texts, path, limits = embedded_texts("chemistry") * 4, tmp_path / f"x.{kind}", {}
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "csv":
        path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    else:
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if kind == "max_rows":
        limits = {"max_rows": len(texts) * 3 // 4}
    chunks = list(read_chunks("forget", [str(path)], DataConfig(**limits)))
    units = [unit for chunk in chunks for unit in pack_chunk(chunk, tokenizer, 64, 4)]
    total = sum(len(unit["tokens"]) for unit in units)
    assert len(chunks) > 2 and sum(unit["share"] for unit in units) == pytest.approx(1.0)
    read = 0.0
    for unit in units:
        read += unit["share"] - len(unit["tokens"]) / total
        assert abs(read) < 0.05


def test_malformed_rows_are_accounted_for_where_they_lie(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS[:50]]
    (tmp_path / "x.jsonl").write_text(
        "\n".join([*lines[:10], "{", *lines[10:40], '{"text": 3}', *lines[40:]])
    )
    units = units_of(tokenizer, [str(tmp_path / "x.jsonl")], max_bad_rows=2)
    ledger = Ledger()
    for unit in units:
        ledger.add(unit)
    found = ledger.summary(["x"], 50, 1)
    assert (found.num_texts, found.num_bad_rows) == (50, 2) and "x.jsonl:11: not JSON" in found.first_bad
    with pytest.raises(DataError, match=r"x.jsonl:11: .*malformed rows: 2, data.max_bad_rows: 1"):
        units_of(tokenizer, [str(tmp_path / "x.jsonl")], max_bad_rows=1)


class TestLedger:
    def accounts(self) -> list[Record]:
        """Three chunks of 2, 1 and 3 units."""
        sizes = (2, 1, 3)
        return [
            {
                "data": "forget",
                "chunk": chunk,
                "unit": unit,
                "is_last_unit": unit == size - 1,
                "is_last_chunk": chunk == 2,
                "num_texts": 10,
                "num_bad": chunk,
                "first_bad": "",
            }
            for chunk, size in enumerate(sizes)
            for unit in range(size)
        ]

    @given(st.randoms(use_true_random=False), st.integers(0, 6))
    @settings(max_examples=50, deadline=None)
    def test_each_counts_once_in_any_order(self, dice: random.Random, repeated: int) -> None:
        accounts, ledger = self.accounts(), Ledger()
        coming = dice.sample([*accounts, *accounts[:repeated]], 6 + repeated)
        assert sum(ledger.add(record) for record in coming) == 6
        assert ledger.is_complete and (ledger.num_texts, ledger.num_bad) == (60, 0 + 0 + 1 + 2 * 3)

    @pytest.mark.parametrize("missing", range(6))
    def test_a_missing_one_is_named(self, missing: int) -> None:
        accounts, ledger = self.accounts(), Ledger()
        for record in accounts[:missing] + accounts[missing + 1 :]:
            ledger.add(record)
        chunk, unit = accounts[missing]["chunk"], accounts[missing]["unit"]
        assert not ledger.is_complete
        assert str(ledger).startswith(
            f"unit {unit} of chunk {chunk} is the first missing, {5 - missing} units"
        )
