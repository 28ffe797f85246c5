"""What a source may be, and the one reader of its records, which says what it found.

    embedded:DOMAIN                the data in the package
    PATH                           a table (.jsonl .json .parquet .arrow .csv), or one text a line (.txt .raw .md)
    FOLDER, PATTERN*               all such files below it, or that match, in sorted order; also what
                                   `Dataset.save_to_disk` left
    hf:ORG/NAME[:CONFIG][:SPLIT]   a Hugging Face dataset; also plain ORG/NAME where there is no such path
    PROTOCOL://...                 a path, a folder (https: with / at its end) or a pattern that fsspec reaches

A malformed row is never dropped in silence: it is counted, located as file:line (file:row in parquet), and
refused beyond `data.max_bad_rows`. Credentials of remote sources come from where their libraries look for them; those
in a URL are refused as far as they can be told, and what follows a "?" is in no message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from fsspec import AbstractFileSystem

from seuf_ray import embedded
from seuf_ray.config import DataConfig
from seuf_ray.data.folders import files_of, shown, suffix_of
from seuf_ray.data.formats import PLAIN, TABLES, File, Item, read_lines
from seuf_ray.errors import DataError

Value = TypeVar("Value")

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([^:/]*))?(?::([^:/]*))?")
NOT_FOUND = "no such file or folder"
OTHER_FILES = {
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


class Extent:
    """How much of a source has been read: its parts count alike."""

    def __init__(self) -> None:
        self.enter(0, 1)

    def enter(self, part: int, of: int, within: Callable[[], float] = float) -> None:
        """The first `part` of `of` parts are done, and of the next one what `within` says."""
        self._part, self._of, self._within = part, of, within

    @property
    def share(self) -> float:
        return (self._part + self._within()) / self._of


class Reading(Generic[Value]):
    """One pass over the records of a source: usable ones as values, in order, and what was found so far.

    Args:
        source: as the job file names it.
        config: column, and limits.
        convert: record -> value; raises ValueError where it is malformed.
        questions: whether questions are read: plain lines hold none, and `config.max_rows` is about texts.

    Attributes:
        num_records, num_bad, first_bad: as in `Found`, so far.
    """

    def __init__(
        self, source: str, config: DataConfig, convert: Callable[[Any], Value], *, questions: bool = False
    ) -> None:
        self.source, self.config, self.convert, self.questions = source, config, convert, questions
        self.num_records = self.num_bad = 0
        self.first_bad = ""
        self._extent = Extent()

    @property
    def share(self) -> float:
        """How much of what is asked for has been read, about; 0 where that cannot be told."""
        by_rows = (
            self.num_records / self.config.max_rows if self.config.max_rows and not self.questions else 0.0
        )
        return min(max(self._extent.share, by_rows), 1.0)

    def __iter__(self) -> Iterator[Value]:
        """Raises DataError: no such source, no usable record, or more malformed ones than `config.max_bad_rows`."""
        most = None if self.questions else self.config.max_rows
        for where, record in _items(self.source, self.config.text_field, self.questions, self._extent):
            try:
                if isinstance(record, ValueError):
                    raise record
                value = self.convert(record)
            except ValueError as error:
                self._reject(f"{where}: {error.args[0]}")
                continue
            self.num_records += 1
            yield value
            if self.num_records == most:
                return
        if self._extent.share:  # else nobody could tell on the way, and all of it at the end would mislead
            self._extent.enter(1, 1)
        if not self.num_records:
            why = f"no usable row; {self.first_bad}" if self.num_bad else "empty, no row at all"
            raise DataError(f"{shown(self.source)}: {why}")

    def collect(self) -> tuple[list[Value], Found]:
        """All of it."""
        values = list(self)
        return values, Found(shown(self.source), self.num_records, self.num_bad, self.first_bad)

    def _reject(self, why: str) -> None:
        self.num_bad, self.first_bad = self.num_bad + 1, self.first_bad or why
        if self.num_bad > self.config.max_bad_rows:
            raise DataError(
                f"{self.first_bad} (malformed rows: {self.num_bad}, data.max_bad_rows: {self.config.max_bad_rows})"
            )


def _items(source: str, text_field: str, questions: bool, extent: Extent) -> Iterator[Item]:
    """The rows of `source` with their places; files that hold plain lines have no questions."""
    if source.startswith("embedded:"):
        return _embedded(source, text_field, questions, extent)
    if "://" in source:
        return _remote(source, text_field, questions, extent)
    if source.startswith("hf:"):
        return _hub(source, source.removeprefix("hf:"), extent)
    path = Path(source).expanduser()
    if path.exists() or "*" in source:
        return _records(fsspec.filesystem("file"), str(path), str(path), text_field, questions, extent)
    is_data_file = path.suffix.lower() in {*TABLES, *PLAIN, *OTHER_FILES}
    if is_data_file or path.parent.is_dir() or not HUB_ID.fullmatch(source):
        raise DataError(f"{source}: {NOT_FOUND} (a Hugging Face dataset is written hf:org/name)")
    return _hub(source, source, extent)


def _embedded(source: str, text_field: str, questions: bool, extent: Extent) -> Iterator[Item]:
    name = source.removeprefix("embedded:")
    try:
        rows = embedded.questions(name) if questions else [{text_field: it} for it in embedded.texts(name)]
    except (ValueError, OSError) as error:
        raise DataError(f"{source}: {error}") from error
    yield from _numbered(source, rows, extent)


def _numbered(source: str, rows: Collection[Any], extent: Extent) -> Iterator[Item]:
    for number, row in enumerate(rows, 1):
        extent.enter(number, len(rows))
        yield f"{source}:{number}", dict(row)


def _hub(source: str, name: str, extent: Extent) -> Iterator[Item]:
    """Rows of a Hugging Face dataset; where it has several splits, one must be named."""
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise DataError(f"{source}: not a dataset; allowed: hf:org/name[:config][:split]")
    try:
        import datasets  # takes seconds, and only hub ids need it

        loaded = datasets.load_dataset(match[1], match[2] or None, split=match[3] or None)
    except Exception as error:  # hub, network, cache, config and split errors share no base class
        why = f"no dataset that could be loaded ({type(error).__name__}: {error})"
        raise DataError(f"{source}: {NOT_FOUND}, and {why}") from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            written = f"hf:{match[1]}:{match[2] or ''}:SPLIT"
            raise DataError(f"{source}: name one of the splits, {written}; allowed: {', '.join(loaded)}")
        (loaded,) = loaded.values()
    yield from _numbered(source, loaded, extent)


def _remote(source: str, text_field: str, questions: bool, extent: Extent) -> Iterator[Item]:
    """Rows of files that fsspec reaches; what its libraries raise has no base class, and may quote the whole URL."""
    url = urlsplit(source)
    if url.password or (url.username and url.scheme in ("http", "https")):
        raise DataError(
            f"{shown(source)}: a user name or password in a URL would be copied into every run's output: give it to "
            f"the library that reads {url.scheme}:// in its own way (environment, credentials file)"
        )
    try:
        system, path = fsspec.url_to_fs(source)
        yield from _records(system, path, shown(source), text_field, questions, extent)
    except Exception as error:
        why = (
            str(error) if isinstance(error, DataError) else f"cannot be read: {type(error).__name__}: {error}"
        )
        where = "" if isinstance(error, DataError) else f"{shown(source)}: "
        raise DataError(where + why.replace(f"?{url.query}", "")) from None


def _records(
    system: AbstractFileSystem, path: str, name: str, text_field: str, questions: bool, extent: Extent
) -> Iterator[Item]:
    files = files_of(system, path, name, {*TABLES} if questions else {*TABLES, *PLAIN})
    for number, file in enumerate(files):
        extent.enter(number, len(files), file.share)
        yield from _file(file, text_field)


def _file(file: File, text_field: str) -> Iterator[Item]:
    suffix = suffix_of(file.path)
    try:
        if suffix in TABLES:
            yield from TABLES[suffix](file)
        else:
            for where, text in read_lines(file):
                yield where, text if isinstance(text, ValueError) else {text_field: text}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.name}: cannot be read: {error}") from error
