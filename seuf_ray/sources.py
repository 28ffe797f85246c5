"""What a source may be, and the one reader of its records, which says what it found.

    embedded:DOMAIN                the data in the package
    PATH                           a table (.jsonl .json .parquet .csv), or one text a line (.txt .raw .md)
    FOLDER                         all such files below it, in sorted order
    hf:ORG/NAME[:CONFIG][:SPLIT]   a Hugging Face dataset; also plain ORG/NAME where there is no such path

A malformed row is never dropped in silence: it is counted, located as file:line (file:row in parquet), and
refused beyond `data.max_bad_rows`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from seuf_ray import embedded
from seuf_ray.config import DataConfig
from seuf_ray.errors import DataError

Item = tuple[
    str, Any
]  # where ("file:line"), and a record {column: value}, or a ValueError that says why there is none
Value = TypeVar("Value")

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([^:/]*))?(?::([^:/]*))?")
OTHER_FILES = {
    ".arrow",
    ".bz2",
    ".gz",
    ".ndjson",
    ".tar",
    ".tsv",
    ".xlsx",
    ".xz",
    ".zip",
    ".zst",
}  # never hub ids


@dataclass(frozen=True)
class Found:
    """What a reader found in one source."""

    source: str
    num_records: int  # usable ones, as many as were returned
    num_bad: int  # malformed ones, left out
    first_bad: str = ""  # file:line and reason of the first malformed one


def collect(
    source: str, config: DataConfig, convert: Callable[[Any], Value], questions: bool
) -> tuple[list[Value], Found]:
    """`convert(record)` for the records of `source`, in order; where it raises ValueError, one is malformed.

    Raises:
        DataError: no such source, no usable record, or more malformed ones than `config.max_bad_rows`.
    """
    values: list[Value] = []
    num_bad, first_bad = 0, ""
    for where, record in _items(source, config.text_field, questions):
        try:
            if isinstance(record, ValueError):
                raise record
            values.append(convert(record))
        except ValueError as error:
            num_bad, first_bad = num_bad + 1, first_bad or f"{where}: {error.args[0]}"
        if num_bad > config.max_bad_rows:
            raise DataError(
                f"{first_bad} (malformed rows: {num_bad}, data.max_bad_rows: {config.max_bad_rows})"
            )
        if len(values) == config.max_rows and not questions:  # training data; evaluation has its own limit
            break
    if not values:
        raise DataError(
            f"{source}: no usable row; {first_bad}" if first_bad else f"{source}: empty, no row at all"
        )
    return values, Found(source, len(values), num_bad, first_bad)


def _items(source: str, text_field: str, questions: bool) -> Iterator[Item]:
    """The rows of `source` with their places; files that hold plain lines have no questions."""
    if source.startswith("embedded:"):
        return _embedded(source, text_field, questions)
    if source.startswith("hf:"):
        return _hub(source, source.removeprefix("hf:"))
    path = Path(source).expanduser()
    if path.exists():
        suffixes = {*TABLES} if questions else {*TABLES, *PLAIN}
        return (item for file in _files(path, suffixes) for item in _file(file, text_field))
    is_data_file = path.suffix.lower() in {*TABLES, *PLAIN, *OTHER_FILES}
    if is_data_file or path.parent.is_dir() or not HUB_ID.fullmatch(source):
        raise DataError(f"{source}: no such file or folder (a Hugging Face dataset is written hf:org/name)")
    return _hub(source, source)


def _embedded(source: str, text_field: str, questions: bool) -> Iterator[Item]:
    name = source.removeprefix("embedded:")
    try:
        rows = embedded.questions(name) if questions else [{text_field: it} for it in embedded.texts(name)]
    except (ValueError, OSError) as error:
        raise DataError(f"{source}: {error}") from error
    yield from ((f"{source}:{number}", row) for number, row in enumerate(rows, 1))


def _hub(source: str, name: str) -> Iterator[Item]:
    """Rows of a Hugging Face dataset; where it has several splits, one must be named."""
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise DataError(f"{source}: not a dataset; allowed: hf:org/name[:config][:split]")
    try:
        import datasets  # takes seconds, and only hub ids need it

        loaded = datasets.load_dataset(match[1], match[2] or None, split=match[3] or None)
    except Exception as error:  # hub, network, cache, config and split errors share no base class
        why = f"no dataset that could be loaded ({type(error).__name__}: {error})"
        raise DataError(f"{source}: no such file or folder, and {why}") from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            written = f"hf:{match[1]}:{match[2] or ''}:SPLIT"
            raise DataError(f"{source}: name one of the splits, {written}; allowed: {', '.join(loaded)}")
        (loaded,) = loaded.values()
    yield from ((f"{source}:{number}", dict(row)) for number, row in enumerate(loaded, 1))


def _files(path: Path, suffixes: set[str]) -> list[Path]:
    """`path` itself, or the readable files below it; hidden ones (caches, checkpoints) do not count."""
    allowed = f"allowed: {', '.join(sorted(suffixes))}"
    if not path.is_dir():
        if path.suffix.lower() not in suffixes:
            raise DataError(f"{path}: files {path.suffix or 'without suffix'} are not read here; {allowed}")
        return [path]
    below = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in suffixes and file.is_file()]
    files = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise DataError(f"{path}: no file that can be read in this folder; {allowed}")
    return files


def _file(path: Path, text_field: str) -> Iterator[Item]:
    suffix = path.suffix.lower()
    try:
        if suffix in TABLES:
            yield from TABLES[suffix](path)
        else:
            for where, text in _lines(path):
                yield where, text if isinstance(text, ValueError) else {text_field: text}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, str | ValueError]]:
    """Lines that are not blank; only newlines end one (U+2028 and the like may stand inside a text)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield (
                    f"{path}:{number}",
                    ValueError(f"not UTF-8 ({error.reason}, byte {error.start} of the line)"),
                )
            else:
                if text.strip():
                    yield f"{path}:{number}", text


def _json_lines(path: Path) -> Iterator[Item]:
    for where, line in _lines(path):
        yield where, line if isinstance(line, ValueError) else _parse(line)


def _parse(text: str) -> Any:
    """The value of a JSON text, or a ValueError that says why there is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error.msg})", error.lineno)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        return ValueError(f"not JSON that can be read ({error})", 1)


def _json(path: Path) -> Iterator[Item]:
    """An array of objects, one object, or (TOFU's .json files) JSON lines."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    value = _parse(text)
    if isinstance(value, list):
        yield from _json_array(path, text)
    elif not isinstance(value, ValueError):
        yield f"{path}:1", value
    elif text.lstrip().startswith("["):  # which rows a broken array has, nobody knows
        raise DataError(f"{path}:{value.args[1]}: {value.args[0]}")
    else:
        yield from _json_lines(path)


def _json_array(path: Path, text: str) -> Iterator[Item]:
    """The elements of a valid array, each with the line it begins on."""
    decoder = json.JSONDecoder()
    line, position, counted = 1, text.index("[") + 1, 0
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        value, position = decoder.raw_decode(text, position)
        yield f"{path}:{line}", value


def _csv(path: Path) -> Iterator[Item]:
    """Rows under a header, each with the line it begins on (quoted fields may hold line breaks)."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    header: list[str] = []
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield where, ValueError(f"not CSV ({error})")
                continue
            if row is None:
                return
            if header and row:
                differs = ValueError(f"{len(row)} fields, the header has {len(header)}")
                yield where, dict(zip(header, row, strict=True)) if len(row) == len(header) else differs
            header = header or row


def _parquet(path: Path) -> Iterator[Item]:
    with pq.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))


Reader = Callable[[Path], Iterator[Item]]
TABLES: dict[str, Reader] = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}
PLAIN = (".txt", ".raw", ".md")
