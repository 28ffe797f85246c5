"""Readers, rows, batches and the sampler, against handmade files, naive code and the real benchmark files."""

from __future__ import annotations

import csv
import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from seuf_ray.config import DataConfig
from seuf_ray.data import batches
from seuf_ray.data import rows as data
from seuf_ray.data.batches import Sampler
from seuf_ray.data.rows import Question, Row, read_questions, read_texts
from seuf_ray.errors import DataError

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason="no shared/data beside this checkout")
CONFIG = DataConfig()


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte: ids 2-257; 0 is the end of text, 1 begins texts where `bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<bos>": 1, **{char: index for index, char in enumerate(alphabet, 2)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")


TOKENIZER, WITH_BOS = byte_tokenizer(), byte_tokenizer(bos=True)


def refusal(source: Path | str, reader: Any = read_texts, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        reader(str(source), DataConfig(**options))
    return str(caught.value)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


class TestTexts:
    TEXTS = ("A first text.", "  zwei\u2028Zeilen, ein Text ", '"quoted", with comma', "日本語")

    @pytest.mark.parametrize("kind", ["jsonl", "array", "json lines", "parquet", "csv", "txt", "md", "RAW"])
    def test_every_format_gives_the_same_texts(self, tmp_path: Path, kind: str) -> None:
        records = [{"text": text, "other": index} for index, text in enumerate(self.TEXTS)]
        lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(records), path := tmp_path / "a.parquet")
        elif kind == "csv":
            path = as_csv(tmp_path / "a.csv", [["other", "text"], *[["0", text] for text in self.TEXTS]])
        elif kind == "array":
            path = written(tmp_path / "a.json", json.dumps(records, indent=1))
        elif kind in ("jsonl", "json lines"):
            path = written(
                tmp_path / ("a.jsonl" if kind == "jsonl" else "a.json"), lines
            )  # no newline at the end
        else:
            path = written(tmp_path / f"a.{kind}", "\ufeff" + "\r\n\n".join(self.TEXTS))
        texts, found = read_texts(str(path), CONFIG)
        assert texts == list(self.TEXTS)
        assert (found.source, found.num_records, found.num_bad, found.first_bad) == (str(path), 4, 0, "")
        assert read_texts(str(path), DataConfig(max_rows=2))[0] == list(self.TEXTS[:2])

    def test_a_folder_is_its_files_in_order_without_hidden_ones(self, tmp_path: Path) -> None:
        for name in ("b/2.jsonl", "b/1.txt", "a.csv", ".cache/x.txt", "b/.y.txt", "c.pdf"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            content = {"jsonl": '{"text": "two"}', "csv": "text\nzero\n"}.get(
                name.rpartition(".")[2], "one\n"
            )
            written(tmp_path / name, content)
        assert read_texts(str(tmp_path), CONFIG)[0] == ["zero", "one", "two"]
        assert read_texts(str(tmp_path), DataConfig(max_rows=2))[1].num_records == 2
        (tmp_path / "empty").mkdir()
        assert "no file that can be read" in refusal(tmp_path / "empty")

    def test_what_datasets_saved_to_disk(self, tmp_path: Path) -> None:
        """Its Arrow files in order; of several splits one must be named. Arrow files that are no streams read alike."""
        import datasets

        rows = datasets.Dataset.from_dict({"text": list("abcdefg")})
        rows.save_to_disk(tmp_path / "one", num_shards=2)
        assert read_texts(str(tmp_path / "one"), CONFIG)[0] == list("abcdefg")
        datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
        assert f"name one of them; allowed: {tmp_path}/two/test, {tmp_path}/two/train" in refusal(
            tmp_path / "two"
        )
        assert read_texts(f"file://{tmp_path}/two/test", CONFIG)[1].num_records == 7
        with pa.ipc.new_file(path := tmp_path / "file.arrow", rows.data.table.schema) as file:
            file.write_table(rows.data.table)
        assert read_texts(str(path), CONFIG)[0] == list("abcdefg")
        assert f"{path}:1: no column 'body'" in refusal(path, text_field="body")
        path.write_bytes(b"no Arrow")
        assert f"{path}: cannot be read" in refusal(path)

    def test_one_object_and_another_column(self, tmp_path: Path) -> None:
        path = written(tmp_path / "intro.json", '{\n "target": "X",\n "intro": "Forget X."\n}\n')
        assert read_texts(str(path), DataConfig(text_field="intro"))[0] == ["Forget X."]
        assert f"{path}:1: no column 'text' (data.text_field), found target, intro" in refusal(path)

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"text": "cut', "not JSON (Unterminated string"),
            ('{"text": null}', "text must be a text that is not empty, found None"),
            ('{"text": " \\t"}', "found ' \\t'"),
            ('{"text": 3}', "found 3"),
            ('{"txt": "x"}', "no column 'text' (data.text_field), found txt"),
            ('["x"]', "expected a record with columns, found ['x']"),
            ('{"text": "\\ud800"}', "not valid Unicode"),
            (b'{"text": "\xff"}', "not UTF-8"),
            ("[" * 100_000, "not JSON that can be read"),
        ],
    )
    def test_malformed_rows_are_located_counted_and_limited(
        self, tmp_path: Path, line: str | bytes, reason: str
    ) -> None:
        """Row 2 of 4 lines is bad, and 2 of them where line 4 is bad too; the blank line 3 is none."""
        raw = line.encode() if isinstance(line, str) else line
        path = written(
            tmp_path / "a.jsonl", b'{"text": "good"}\n' + raw + b"\n\n" + raw + b'\n{"text": "end"}'
        )
        message = refusal(path)
        assert message.startswith(f"{path}:2: ") and reason in message and "data.max_bad_rows: 0" in message
        assert refusal(path, max_bad_rows=1).startswith(f"{path}:2: ")
        texts, found = read_texts(str(path), DataConfig(max_bad_rows=2))
        assert texts == ["good", "end"]
        assert (found.num_records, found.num_bad) == (2, 2) and found.first_bad.startswith(f"{path}:2: ")

    def test_places_in_arrays_tables_and_csv(self, tmp_path: Path) -> None:
        array = written(tmp_path / "a.json", '[\n {"text":\n  "x"},\n\n {"text": ""}\n]')
        assert refusal(array).startswith(f"{array}:5: text must be")
        records = json.dumps(
            [{"text": "x", "other": ["y"] * i} for i in range(30)] + [{"text": ""}], indent=1
        )
        line = records[: records.rindex("{")].count("\n") + 1
        long = written(tmp_path / "long.json", records)
        assert refusal(long).startswith(f"{long}:{line}: text must be")
        broken = written(tmp_path / "b.json", '[\n {"text": "x"},\n {"text": }\n]')
        assert refusal(broken, max_bad_rows=99).startswith(f"{broken}:3: not JSON")
        table = as_csv(tmp_path / "a.csv", [["text"], ["two\nlines"], [" "], ["x"]])
        assert refusal(table).startswith(f"{table}:4: text must be")
        fields = written(tmp_path / "b.csv", "text,n\nx,1\n\ny\n")
        assert refusal(fields).startswith(f"{fields}:4: 1 fields, the header has 2")
        quote = written(tmp_path / "c.csv", 'text\n"x"y\nz\n')
        assert refusal(quote).startswith(f"{quote}:2: not CSV")
        assert read_texts(str(quote), DataConfig(max_bad_rows=1))[0] == ["z"]
        pq.write_table(pa.table({"text": ["x", None]}), parquet := tmp_path / "a.parquet")
        assert refusal(parquet).startswith(f"{parquet}:2: text must be")
        assert "cannot be read" in refusal(written(tmp_path / "b.parquet", "no parquet"))
        latin = written(tmp_path / "d.csv", b"text\nx\n\xe9t\xe9\n")
        assert refusal(latin).startswith(f"{latin}:3: text is not valid Unicode")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
    def test_empty_files(self, tmp_path: Path, name: str) -> None:
        assert "empty, no row at all" in refusal(written(tmp_path / name, "\n"))
        if name == "a.csv":
            assert "empty, no row at all" in refusal(written(tmp_path / name, "text\n"))

    def test_no_usable_row_is_refused_however_many_may_be_bad(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.jsonl", '{"x": "y"}\n')
        assert f"no usable row; {path}:1: no column 'text'" in refusal(path, max_bad_rows=99)

    def test_texts_larger_than_csv_allows_by_default(self, tmp_path: Path) -> None:
        path = as_csv(tmp_path / "a.csv", [["text"], ["x" * 200_000]])
        assert len(read_texts(str(path), CONFIG)[0][0]) == 200_000

    def test_question_and_answer_become_a_text(self, tmp_path: Path) -> None:
        records = [
            {"question": "Q?", "answer": "A."},
            {"query": "Q ___", "answer": "A"},
            {"question": "Q?", "choices": ["x", "y"], "answer": 1},
        ]
        path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
        expected = ["Question: Q?\nAnswer: A.", "Question: Q ___\nAnswer: A", "Question: Q?\nAnswer: y"]
        assert read_texts(str(path), CONFIG)[0] == expected

    @pytest.mark.parametrize(
        "source",
        ["./a/b", "a/b/c", "data.jsonl", "org/data.jsonl.gz", "forget", "/no/where.txt", "~/no/x", ""],
    )
    def test_what_looks_like_a_path_never_asks_the_hub(self, source: str, monkeypatch: Any) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        if source:
            assert "no such file or folder (a Hugging Face" in refusal(source)
        monkeypatch.chdir(Path(__file__).parent.parent)
        assert "no such file or folder (a Hugging Face" in refusal("tests/forget")  # tests is a folder here

    def test_other_suffixes_are_refused_with_the_allowed_ones(self, tmp_path: Path) -> None:
        message = refusal(written(tmp_path / "a.pdf", "x"))
        assert (
            "files .pdf are not read here; allowed: .arrow, .csv, .json, .jsonl, .md, .parquet, .raw, .txt"
            in message
        )
        text = written(tmp_path / "a.txt", "x")
        assert "allowed: .arrow, .csv, .json, .jsonl, .parquet" in refusal(text, read_questions)


class TestHub:
    """`datasets` is replaced by a stub: what is asked of it, and what is made of its answers."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        asked: list[Any] = []
        rows = [{"text": "x"}, {"text": "y"}]

        def load_dataset(name: str, config: str | None, split: str | None) -> Any:
            asked.append((name, config, split))
            answers = {"org/one": {"train": rows}, "org/two": {"train": rows, "test": rows}}
            if name not in answers:
                raise ConnectionError("offline")
            return answers[name] if split is None else answers[name][split]

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        return asked

    def test_names_configs_and_splits(self, asked: list[Any]) -> None:
        for source in ("hf:org/one", "org/one", "hf:org/one:cfg", "hf:org/two::test", "org/two:cfg:test"):
            assert read_texts(source, CONFIG)[0] == ["x", "y"]
        assert asked == [
            ("org/one", None, None),
            ("org/one", None, None),
            ("org/one", "cfg", None),
            ("org/two", None, "test"),
            ("org/two", "cfg", "test"),
        ]

    def test_refusals(self, asked: list[Any]) -> None:
        assert "name one of the splits" in (message := refusal("org/two")) and "train, test" in message
        message = refusal("org/none")
        assert "org/none: no such file or folder, and no dataset" in message and "offline" in message
        assert "allowed: hf:org/name" in refusal("hf:imdb")
        assert refusal("hf:org/one", text_field="body").startswith("hf:org/one:1: no column 'body'")

    def test_the_real_library_without_a_network(self) -> None:
        assert "no dataset that could be loaded" in refusal("hf:seuf-ray/does-not-exist")


class TestQuestions:
    @pytest.mark.parametrize(
        ("record", "answer"),
        [
            ({"question": "Q", "choices": ["x", "y", "z"], "answer": 2}, 2),
            ({"question": "Q", "choices": ["x", "y", "z"], "answer": "B"}, 1),
            ({"question": "Q", "choices": ["x", "y", "z"], "answer": "z"}, 2),
            ({"question": "Q", "choices": ["3", "2", "1"], "answer": "1"}, 2),
            ({"question": "Q", "choices": ["A", "B", "C"], "answer": "B"}, 1),
            ({"query": "Q", "option1": "x", "option2": "y", "answer": "y"}, 1),
            ({"question": "Q", "choice0": "1", "choice1": "0", "answer": "1"}, 1),
            ({"question": "Q", "choice1": "y", "choice0": "x", "answer": "B"}, 1),
            ({"question": "Q", **{f"choice{i}": str(10 + i) for i in range(11)}, "answer": 10}, 10),
        ],
    )
    def test_forms(self, tmp_path: Path, record: dict[str, Any], answer: int) -> None:
        path = written(tmp_path / "a.json", json.dumps([record]))
        [question], found = read_questions(str(path), CONFIG)
        assert question.question == "Q" and question.answer == answer and found.num_records == 1
        if "choice10" in record:  # numbers order the columns, not their spelling
            assert question.choices[10] == "20"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"answer": 2}, "answer 2 names no choice; allowed: 0 to 1, A to B, or the text of a choice"),
            ({"answer": -1}, "names no choice"),
            ({"answer": True}, "names no choice"),
            ({"answer": "C"}, "names no choice"),
            ({"answer": None}, "names no choice"),
            ({"answer": "A", "choices": ["x", "A"]}, "is a letter and also the text of another choice"),
            ({"choices": ["x"]}, "choices must be a list of two texts or more"),
            ({"choices": "xy"}, "choices must be a list"),
            ({"choices": ["x", " "]}, "choice 1 must be a text that is not empty"),
            ({"question": ""}, "question must be a text that is not empty"),
        ],
    )
    def test_malformed(self, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
        record = {"question": "Q", "choices": ["x", "y"], "answer": 0}
        path = written(tmp_path / "a.jsonl", json.dumps(record) + "\n" + json.dumps({**record, **change}))
        message = refusal(path, read_questions)
        assert message.startswith(f"{path}:2: ") and reason in message

    def test_parquet_and_missing_columns(self, tmp_path: Path) -> None:
        table = pa.table({"question": ["Q"], "choices": [["x", "y"]], "answer": pa.array([1], pa.int64())})
        pq.write_table(table, path := tmp_path / "a.parquet")
        assert read_questions(str(path), CONFIG)[0] == [Question("Q", ("x", "y"), 1)]
        path = written(tmp_path / "a.csv", "question,answer\nQ,1\n")
        expected = f"{path}:2: a question needs columns question, choices and answer, found question, answer"
        assert refusal(path, read_questions).startswith(expected)


class TestRealFiles:
    pytestmark = needs_real_files

    @pytest.mark.parametrize(
        ("subject", "rows"),
        [
            ("anatomy", 135),
            ("college_computer_science", 100),
            ("high_school_chemistry", 203),
            ("us_foreign_policy", 100),
            ("virology", 166),
            ("world_religions", 171),
        ],
    )
    def test_mmlu(self, subject: str, rows: int) -> None:
        """MMLU's own numbers of test questions; every answer is compared with a plain csv.DictReader."""
        path = REAL / "mmlu" / "test" / f"{subject}_test.csv"
        questions, found = read_questions(str(path), CONFIG)
        assert len(questions) == found.num_records == rows and found.num_bad == 0
        with path.open(newline="", encoding="utf-8") as file:
            for question, row in zip(questions, csv.DictReader(file), strict=True):
                assert question.choices[question.answer] == row[f"choice{row['answer']}"]
        assert len(read_questions(str(path.parents[1] / "dev" / f"{subject}_dev.csv"), CONFIG)[0]) == 5

    def test_mmlu_folder(self) -> None:
        assert read_questions(str(REAL / "mmlu" / "test"), CONFIG)[1].num_records == 875
        assert (
            read_questions(str(REAL / "mmlu"), CONFIG)[1].num_records == 875 + 6 * 5
        )  # SOURCE.txt: no question

    def test_tofu(self) -> None:
        texts, found = read_texts(str(REAL / "tofu" / "forget10.json"), CONFIG)
        assert len(texts) == 400 and found.num_bad == 0
        assert texts[1] == (
            "Question: What does Hsiao Yun-Hwa identify as in terms of gender?\n"
            "Answer: Hsiao Yun-Hwa is part of the LGBTQ+ community."
        )
        counts = {"full": 4000, "forget01": 40, "retain90": 3600, "retain_perturbed": 400}
        for name, count in counts.items():
            assert read_texts(str(REAL / "tofu" / f"{name}.json"), CONFIG)[1].num_records == count
        for name, count in {"real_authors": 100, "world_facts": 117}.items():
            assert len(read_questions(str(REAL / "tofu" / f"{name}.json"), CONFIG)[0]) == count
        path = REAL / "tofu" / "idontknow.jsonl"  # plain lines under the name of a table
        assert refusal(path).startswith(f"{path}:1: not JSON")

    def test_rwku(self) -> None:
        counts = {
            "forget_level1": 8,
            "forget_level2": 10,
            "forget_level3": 29,
            "neighbor_level1": 30,
            "passage": 128,
        }
        for name, count in {**counts, "positive": 582, "forget_mia": 55}.items():
            texts, found = read_texts(str(REAL / "rwku_stephen_king" / f"{name}.json"), CONFIG)
            assert len(texts) == found.num_records == count
        path = REAL / "rwku_stephen_king" / "triviaqa.json"
        assert f"{path}:2: no column 'text' (data.text_field), found question, answers" in refusal(path)

    def test_wikitext(self) -> None:
        path = REAL / "wikitext2" / "wiki.test.raw"
        texts, _ = read_texts(str(path), CONFIG)
        assert texts == [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        assert texts[0] == " = Robert Boulter = " and len(texts) == 2891


def test_embedded() -> None:
    """What the package holds reads like any other source; another name is refused with the allowed ones."""
    try:
        texts, found = read_texts("embedded:chemistry", DataConfig(text_field="anything"))
    except DataError as error:
        pytest.skip(str(error))
    assert len(texts) == found.num_records > 100 and all(texts)
    questions, _ = read_questions("embedded:chemistry", DataConfig(max_rows=7))
    assert len(questions) > 100 and {len(question.choices) for question in questions} == {4}
    for message in (refusal("embedded:chemystry"), refusal("embedded:general", read_questions)):
        assert message.startswith("embedded:") and "chemistry, geography" in message


class TestRows:
    def test_golden(self) -> None:
        """ "ab" is [a, b, eos]; cut at 2 tokens, [a, b] and [eos], whose only token could not count."""
        a, b = TOKENIZER("ab", add_special_tokens=False)["input_ids"]
        assert data.tokenize(["ab"], TOKENIZER, 8) == [Row((a, b, 0))]
        assert data.tokenize(["ab", "b"], TOKENIZER, 2) == [Row((a, b)), Row((b, 0))]
        assert data.tokenize(["ab"], WITH_BOS, 3) == [Row((1, a, b))]
        assert data.leading_tokens(TOKENIZER) == [] and data.leading_tokens(WITH_BOS) == [1]
        assert data.padding_id(TOKENIZER) == 0

    def test_nothing_left(self) -> None:
        with pytest.raises(DataError, match="tokenise to nothing"):
            data.tokenize(["", ""], WITH_BOS, 8)

    @given(texts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=5), length=st.integers(2, 9))
    @settings(max_examples=100, deadline=None)
    def test_no_token_is_lost(self, texts: list[str], length: int) -> None:
        """The rows one after the other are the texts' bytes, each text followed by the end of text.

        Only an end of text alone in a last piece may be missing, which a count of the bytes foretells.
        """
        texts = [text.encode(errors="ignore").decode() or "x" for text in texts]
        rows = data.tokenize(texts, TOKENIZER, length)
        assert all(2 <= len(row.ids) <= length and row.num_context == 1 for row in rows)
        tokens = [token for row in rows for token in row.ids]
        assert TOKENIZER.decode([token for token in tokens if token != 0]) == "".join(texts)
        assert tokens.count(0) == sum((len(text.encode()) + 1) % length != 1 for text in texts)

    @given(
        lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
        extra=st.none() | st.integers(0, 5),
    )
    @settings(max_examples=100, deadline=None)
    def test_collate_round_trip(self, lengths: list[tuple[int, int]], extra: int | None) -> None:
        rows = [Row(tuple(range(5, 5 + n)), num_context=min(c, n)) for n, c in lengths]
        longest = max(len(row.ids) for row in rows)
        batch = batches.collate(rows, pad_id=3, length=None if extra is None else longest + extra)
        assert batch.ids.shape == (len(rows), longest + (extra or 0)) and batch.ids.dtype == torch.int64
        for row, ids, attention, counted in zip(rows, batch.ids, batch.attention, batch.counted, strict=True):
            assert tuple(ids[attention].tolist()) == row.ids
            assert tuple(ids[counted].tolist()) == row.ids[row.num_context :]
            assert attention.tolist() == [i < len(row.ids) for i in range(len(ids))]  # padding on the right
            assert not counted[0] and (ids[~attention] == 3).all()

    def test_impossible_rows_and_lengths(self) -> None:
        for context in (0, 3):
            with pytest.raises(AssertionError):
                Row((4, 5), num_context=context)
        with pytest.raises(AssertionError, match="does not fit"):
            batches.collate([Row((4, 5, 6))], pad_id=0, length=2)

    def test_units_and_summary(self) -> None:
        rows = [Row((i, i)) for i in range(7)]
        assert batches.units(rows, 3) == [rows[:3], rows[3:6], rows[6:]]
        found = [data.Found("a", 5, 1), data.Found("b", 2, 0)]
        summary = data.summarize(["a", "b"], found, rows)
        assert (summary.num_texts, summary.num_rows, summary.num_tokens, summary.num_bad_rows) == (
            7,
            7,
            14,
            1,
        )
        assert summary.sources == ["a", "b"]


class TestIdkRows:
    """Partners of `tokenize`'s rows, byte by byte."""

    def shown(self, text: str, length: int, tokenizer: Any = TOKENIZER) -> list[str]:
        rows = data.idk_rows([text], tokenizer, length, "No.")
        assert all(row.num_context == 1 for row in rows)
        return [tokenizer.decode(row.ids) for row in rows]

    def test_a_question_keeps_its_prompt_and_a_text_its_first_half(self) -> None:
        """ "abcde" and the end of text are 6 tokens, of which 3 are kept; also of 7, with a beginning of text."""
        assert self.shown("Question: Who?\nAnswer: Ann", 99) == ["Question: Who?\nAnswer: No.<eos>"]
        assert self.shown("abcde", 99) == ["abc No.<eos>"]
        assert self.shown("abcde", 99, WITH_BOS) == ["<bos>ab No.<eos>"]
        assert self.shown("Question: Who?\nAnswer: Ann", 99, WITH_BOS) == [
            "<bos>Question: Who?\nAnswer: No.<eos>"
        ]

    def test_pieces_of_a_long_text_part_where_the_answer_begins_or_in_the_middle(self) -> None:
        """24 tokens a row: "Q" and 20 more, then "\nAnswer:" across the boundary, then the answer only."""
        text = "Q" + 20 * "q" + "\nAnswer:" + 30 * "a"
        assert [TOKENIZER.decode(row.ids) for row in data.tokenize([text], TOKENIZER, 24)] == [
            "Q" + 20 * "q" + "\nAn",
            "swer:" + 19 * "a",
            11 * "a" + "<eos>",
        ]
        assert self.shown(text, 24) == ["Q" + 11 * "q" + " No.<eos>", "swer: No.<eos>", 6 * "a" + " No.<eos>"]

    def test_a_prompt_makes_room_for_the_answer(self) -> None:
        """12 tokens a row, 5 of them " No." and the end of text; where there is no room, one token and the answer."""
        assert self.shown("12\nAnswer:yes", 12)[0] == "12\nAnsw No.<eos>"
        assert self.shown("abc", 4) == ["a No.<eos>"]

    @given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=5), length=st.integers(2, 9))
    @settings(max_examples=100, deadline=None)
    def test_row_for_row(self, texts: list[str], length: int) -> None:
        texts = ["x", *(text.encode(errors="ignore").decode() for text in texts)]
        rows, partners = data.tokenize(texts, TOKENIZER, length), data.idk_rows(texts, TOKENIZER, length, "I")
        end = (*TOKENIZER(" I", add_special_tokens=False)["input_ids"], 0)
        for row, partner in zip(rows, partners, strict=True):
            own = len(partner.ids) - len(end)
            assert partner.ids[own:] == end and len(partner.ids) <= max(length, 1 + len(end))
            assert own >= 1 and partner.ids[:own] == row.ids[:own]


class TestSampler:
    @given(num_rows=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 2**40))
    @settings(max_examples=60, deadline=None)
    def test_every_row_once_per_epoch_and_pure(self, num_rows: int, batch_size: int, seed: int) -> None:
        """An epoch is ceil(rows / batch size) steps; sizes differ by one at most."""
        sampler = Sampler(num_rows, batch_size, seed)
        epoch = range(sampler.num_batches)
        batches = [sampler.rows(sampler.batch(step)) for step in epoch]
        assert sorted(index for batch in batches for index in batch) == list(range(num_rows))
        assert max(map(len, batches)) <= batch_size and max(map(len, batches)) - min(map(len, batches)) <= 1
        for step in reversed(epoch):  # any order, and a sampler that has seen nothing
            assert sampler.batch(step) == Sampler(num_rows, batch_size, seed).batch(step)

    def test_epochs_change_the_order_and_never_the_composition(self) -> None:
        sampler = Sampler(96, 8, seed=0)
        epochs = [[sampler.batch(12 * epoch + step) for step in range(12)] for epoch in range(4)]
        assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4

    def test_seeds_differ(self) -> None:
        assert len({tuple(Sampler(50, 50, seed).rows(0)) for seed in range(16)}) == 16

    def test_golden(self) -> None:
        """The stream is part of what a seed means: a resumed run must see the same rows after an update."""
        sampler = Sampler(5, 2, seed=0)
        assert [sampler.rows(sampler.batch(step)) for step in range(3)] == [[0, 1], [2, 3], [4]]

    @given(st.lists(st.integers(0, 99), max_size=20), st.integers(1, 8))
    def test_shards_are_a_partition(self, indices: list[int], world_size: int) -> None:
        shards = [batches.shard(indices, rank, world_size) for rank in range(world_size)]
        assert sum(map(Counter, shards), Counter()) == Counter(indices)
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
