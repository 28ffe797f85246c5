"""Files of records, here or wherever fsspec reaches (`s3://`, `gs://`, `https://`, `hf://`, ...).

    .jsonl .json .csv              records, each a dict of columns
    .parquet .arrow                the same; Arrow files or streams, such as `Dataset.save_to_disk` writes
    .txt .raw .md                  one text a line

Files are read from their beginning to their end as they come, never as a whole: but for .json, and for parquet from a
web server that does not serve parts. A record comes with its place, "file:line" ("file:row" in parquet and Arrow).
"""

from __future__ import annotations

import csv
import functools
import io
import json
import operator
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from seuf_ray.errors import DataError

# where ("file:line"), and a record {column: value}, or a ValueError that says why there is none
Item = tuple[str, Any]


@dataclass
class File:
    """One file of a source.

    Attributes:
        name: what messages call it.
        system: who has it.
        path: what it is called there.
        told: what `share` is.
    """

    name: str
    system: AbstractFileSystem
    path: str
    told: Callable[[], float] = float

    def share(self) -> float:
        """How much of it has been read, while it is; 0 where that cannot be told."""
        return self.told()

    def stream(self) -> io.BufferedReader:
        """Its bytes, from the beginning to the end; a web server need not serve parts for that."""
        options = {"block_size": 0} if _is_web(self.system) else {}
        raw = self.system.open(self.path, "rb", **options)
        stream, size = io.BufferedReader(raw, 2**20), getattr(raw, "size", None)
        if size:  # not every web server says
            self.told = lambda: _told(stream, size)
        return stream

    def seekable(self) -> io.BufferedReader:
        """Its bytes in any order: those that are asked for, if the server serves parts, else a copy of all."""
        file = cast(io.BufferedReader, self.system.open(self.path, "rb"))
        if not _is_web(self.system) or _serves_parts(file):
            return file
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        with self.stream() as whole:
            shutil.copyfileobj(whole, copy)
        return cast(io.BufferedReader, copy)


def _told(stream: io.BufferedReader, size: int) -> float:
    try:
        return stream.tell() / size
    except OSError:  # a file system that does not know where it is
        return 0.0
    except ValueError:  # closed
        return 1.0


def _is_web(system: AbstractFileSystem) -> bool:
    return "http" in system.protocol


def _serves_parts(file: io.BufferedReader) -> bool:
    """Whether a web server gives the end of a file without the rest."""
    try:
        return file.seekable() and bool(file.seek(-1, io.SEEK_END)) and len(file.read(1)) == 1
    except (OSError, ValueError):
        return False


def read_lines(file: File) -> Iterator[tuple[str, str | ValueError]]:
    """Lines that are not blank; only newlines end one (U+2028 and the like may stand inside a text)."""
    with file.stream() as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file.name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield where, ValueError(f"not UTF-8 ({error.reason}, byte {error.start} of the line)")
            else:
                if text.strip():
                    yield where, text


def _json_lines(file: File) -> Iterator[Item]:
    for where, line in read_lines(file):
        yield where, line if isinstance(line, ValueError) else _parse(line)


def _parse(text: str) -> Any:
    """The value of a JSON text, or a ValueError that says why there is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error.msg})", error.lineno)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        return ValueError(f"not JSON that can be read ({error})", 1)


def _json(file: File) -> Iterator[Item]:
    """An array of objects, one object, or (TOFU's .json files) JSON lines."""
    with file.stream() as stream:
        text = stream.read().decode("utf-8-sig", errors="surrogateescape")
    value = _parse(text)
    if isinstance(value, list):
        yield from _json_array(file, text)
    elif not isinstance(value, ValueError):
        yield f"{file.name}:1", value
    elif text.lstrip().startswith("["):  # which rows a broken array has, nobody knows
        raise DataError(f"{file.name}:{value.args[1]}: {value.args[0]}")
    else:
        yield from _json_lines(file)


def _json_array(file: File, text: str) -> Iterator[Item]:
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
        file.told = functools.partial(operator.truediv, position, len(text))
        yield f"{file.name}:{line}", value


def _csv(file: File) -> Iterator[Item]:
    """Rows under a header, each with the line it begins on (quoted fields may hold line breaks)."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    header: list[str] = []
    with io.TextIOWrapper(file.stream(), "utf-8-sig", newline="", errors="surrogateescape") as lines:
        reader = csv.reader(lines, strict=True)
        while True:
            where = f"{file.name}:{reader.line_num + 1}"
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


def _parquet(file: File) -> Iterator[Item]:
    with file.seekable() as seekable, pq.ParquetFile(seekable) as table:
        rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            file.told = functools.partial(operator.truediv, number, table.metadata.num_rows)
            yield f"{file.name}:{number}", row


def _arrow(file: File) -> Iterator[Item]:
    with file.stream() as stream:
        is_file = stream.peek(6)[:6] == b"ARROW1"
        batches = _file_batches(file) if is_file else pa.ipc.open_stream(stream)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{file.name}:{number}", row) for number, row in enumerate(rows, 1))


def _file_batches(file: File) -> Iterator[pa.RecordBatch]:
    with file.seekable() as seekable, pa.ipc.open_file(seekable) as table:
        for number in range(table.num_record_batches):
            file.told = functools.partial(operator.truediv, number, table.num_record_batches)
            yield table.get_batch(number)


Reader = Callable[[File], Iterator[Item]]
TABLES: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _csv,
}
PLAIN = (".txt", ".raw", ".md")
