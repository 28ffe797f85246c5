"""The command line of every job: `python jobs/NAME.py FILE.toml [dotted.path=value ...]`.

`--help` and a mistake in the job file cost no import of torch or ray. Errors that are the user's are one message and
exit status 1; everything else keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from seuf_ray.config import JobConfig, S, load_as
from seuf_ray.config.keys import keys_of
from seuf_ray.errors import ConfigError, MismatchError


def command(description: str | None, argv: list[str] | None = None) -> JobConfig:
    """The job that the command line asks for.

    Args:
        description: the script's docstring, shown by `--help`.
        argv: arguments; default: the process's own.
    """
    return command_as(JobConfig, description, argv)


def command_as(kind: type[S], description: str | None, argv: list[str] | None = None) -> S:
    """The same for a job whose file says something else."""
    sys.excepthook = _say
    parser = argparse.ArgumentParser(
        description=description,
        epilog="keys of the job file, each also an override; NAME[] are those of a [[NAME]] row:\n\n"
        + "\n".join(map(str, keys_of(kind))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE.toml", help="the job file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # else argparse would say that they are required
        metavar="dotted.path=value",
        help="e.g. training.learning_rate=1e-3",
    )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_advice(unknown))
    _find_modules_here()
    return load_as(kind, arguments.file, arguments.overrides)


def _advice(unknown: Sequence[str]) -> str:
    """What to write in place of arguments that are none; overrides look like options to many."""
    path, _, value = unknown[0].lstrip("-").partition("=")
    if re.fullmatch(r"\w+(\.\w+)*", path) and unknown[0].startswith("-"):
        return f"{unknown[0]}: write {path}={value or 'value'}, without dashes"
    return f"unknown arguments: {' '.join(unknown)}"


def pair_after(flag: str, argv: list[str] | None = None) -> tuple[Path, Path] | None:
    """The two files that follow `flag` on a command line that asks for them, and not for a job."""
    sys.excepthook = _say
    arguments = sys.argv[1:] if argv is None else argv
    if flag not in arguments:
        return None
    files = arguments[arguments.index(flag) + 1 :]
    if len(files) != 2:
        raise ConfigError(f"{flag} takes two files, A.json B.json, found {len(files)}")
    return Path(files[0]), Path(files[1])


def _find_modules_here() -> None:
    """Plug-ins in the current folder: a script finds those beside itself only. Ray gives its workers the same path."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, ConfigError | MismatchError):
        print(f"{kind.__name__}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
