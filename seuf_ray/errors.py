"""What goes wrong, said once: where it was written, what was written, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class ConfigError(ValueError):
    """The user's request cannot be carried out as written; raised on the driver, before Ray starts."""


class DataError(ConfigError):
    """A data source is missing, empty or malformed; names the file and the row."""


class MismatchError(ValueError):
    """An artifact or a patch was made for something else; the message names both sides."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`"did you mean 'npo'? allowed: ga, gdiff, npo"`: the tail of every message about an unknown name."""
    names = sorted(allowed)
    close = get_close_matches(word, names, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}allowed: {', '.join(names)}"


@contextmanager
def said_of(key: str, advice: str = "") -> Iterator[None]:
    """What is wrong inside is said of the key that asked for it, and ends with `advice`."""
    try:
        yield
    except (ConfigError, MismatchError) as error:
        raise type(error)(f"{key}: {error}{advice}") from error
