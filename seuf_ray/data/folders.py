"""What a path, a folder or a pattern of files means, here or in a file system that fsspec reaches."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from fsspec import AbstractFileSystem

from seuf_ray.data.formats import File
from seuf_ray.errors import DataError

# User and password, a user alone on the web, and everything from "?" on.
IN_URL = re.compile(r"(?<=://)[^/@?]*:[^/@?]*@|(?<=https://)[^/@?]*@|(?<=http://)[^/@?]*@|\?.*", re.DOTALL)
DESCRIPTIONS = {"dataset_info.json", "state.json"}  # of a folder of Arrow files


def shown(source: str) -> str:
    """A source as messages and artifacts name it: without what may be a credential in a URL."""
    return IN_URL.sub("", source) if "://" in source else source


def files_of(system: AbstractFileSystem, path: str, name: str, suffixes: set[str]) -> list[File]:
    """`path` itself, or the readable files below or like it; hidden ones (caches, checkpoints) do not count."""
    allowed = f"allowed: {', '.join(sorted(suffixes))}"
    root = path.partition("*")[0]
    if "*" in path:
        found = system.glob(path)
    elif name.endswith("/") or system.info(path)["type"] == "directory":
        found = system.find(path)
    elif suffix_of(path) in suffixes:
        return [File(name, system, path)]
    else:
        raise DataError(f"{name}: files {suffix_of(path) or 'without suffix'} are not read here; {allowed}")
    seen = [one for one in found if "/." not in f"/{one.removeprefix(root)}" and suffix_of(one) in suffixes]
    seen = _without_descriptions(seen, name)
    if not seen:
        raise DataError(f"{name}: no file that can be read in this folder; {allowed}")
    is_url = "://" in name
    names = {one: shown(system.unstrip_protocol(one)) if is_url else one for one in seen}
    return [File(names[one], system, one) for one in sorted(seen, key=lambda one: one.split("/"))]


def _without_descriptions(files: list[str], name: str) -> list[str]:
    """`files` without the JSON that `save_to_disk` puts beside a dataset's Arrow files, and that holds no records.

    Raises:
        DataError: a dataset with splits, of which nobody said which.
    """
    if any(one.endswith("/dataset_dict.json") for one in files):
        folders = {PurePosixPath(one).parent.name for one in files if suffix_of(one) == ".arrow"}
        allowed = ", ".join(f"{name.rstrip('/')}/{split}" for split in sorted(folders))
        raise DataError(f"{name}: a dataset with splits: name one of them; allowed: {allowed}")
    tables = {PurePosixPath(one).parent for one in files if suffix_of(one) == ".arrow"}
    described = {f"{folder}/{description}" for folder in tables for description in DESCRIPTIONS}
    return [one for one in files if one not in described]


def suffix_of(path: str) -> str:
    """`.jsonl` of `data/A.JSONL?token`."""
    return PurePosixPath(path.partition("?")[0]).suffix.lower()
