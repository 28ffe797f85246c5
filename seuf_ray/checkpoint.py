"""Hugging Face folders by tensor name: lazy reads, digests, and whole copies with a few tensors exchanged.

    folder = config.json | model.safetensors, or model.safetensors.index.json and shards | tokenizer files
    shard  = u64 length of the header | JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes

Only headers are read until a tensor is asked for, so a checkpoint of 671 B parameters opens in seconds. A
replaced tensor keeps its dtype and shape, hence its place in the shard: `rewrite` copies every file and
overwrites those bytes only, which needs the memory of one tensor and leaves all others bit for bit as they
were. Pickles and code are neither read nor copied. torch loads where tensors are touched: `--help` is quick.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from safetensors import SafetensorError, safe_open

from seuf_ray import embedded
from seuf_ray.artifacts import ModelIdentity
from seuf_ray.errors import ConfigError, MismatchError
from seuf_ray.families import family_of, shape_of

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")  # config, tokenizer, chat template
_VOLATILE = {
    "transformers_version",
    "torch_dtype",
    "dtype",
}  # who saved it and how to load it, not what it is


class Entry(NamedTuple):
    """A tensor in a shard's header: dtype in safetensors' words (F32, BF16), and the byte it begins at."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def resolve(name: str, revision: str | None = None) -> Path:
    """The folder of a model: `embedded:NAME`, a local folder, or a hub id (downloaded: no pickles or code).

    Raises:
        ConfigError: no such folder or hub repository, no config.json in it, or a revision of something local.
    """
    is_embedded = name.startswith("embedded:")
    is_local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()
    if revision is not None and (is_embedded or is_local):
        raise ConfigError(f"model.revision {revision!r}: {name!r} is local; only hub ids have revisions")
    try:
        folder = (
            embedded.checkpoint(name.removeprefix("embedded:")) if is_embedded else Path(name).expanduser()
        )
    except ValueError as error:
        raise ConfigError(f"model.name {name!r}: {error}") from error
    folder = folder if is_embedded or is_local else _download(name, revision)
    if not (folder / "config.json").is_file():
        what = "config.json is missing" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {what}; allowed: embedded:NAME, a Hugging Face folder, or a hub id")
    return folder


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download

        allowed = ["*.safetensors", *COMPANIONS]
        ignored = ["*/*", "consolidated*"]  # the same weights in other formats
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored)
        )
    except Exception as error:  # the hub client raises OSError, ValueError and its HTTP library's own errors
        at = f" at revision {revision!r}" if revision else ""
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
        )
        raise ConfigError(
            f"model.name {name!r}: no such local folder, nor a download from the hub{at} ({reason})"
        ) from error


class Checkpoint:
    """A Hugging Face folder of a family in `families.py`; nothing but headers is read until `read`.

    Attributes:
        folder, config, family, shape: where it is, its config.json, and what that says.
        files: tensor name -> file name of the shard that holds it.
        entries: tensor name -> what the shard's header says of it.

    Raises:
        ConfigError: an unknown family, pickles only, or a missing, truncated or incomplete shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_json(folder / "config.json")
        try:
            self.family, self.shape = family_of(self.config), shape_of(self.config)
        except KeyError as error:
            raise ConfigError(f"{folder / 'config.json'}: key {error} is missing") from error
        self.files, self.entries = _read_headers(folder)
        self._handles: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}  # open files do not travel to other processes

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape) of a tensor as in `("BF16", (32, 64))`; raises MismatchError where there is none."""
        if name not in self.entries:
            raise MismatchError(f"{self.folder} has no tensor {name!r}, only {len(self.entries)} others")
        return self.entries[name][:2]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or its slice `[index]` along the first dimension; a copy that the caller may change."""
        self.info(name)
        shard = self.files[name]
        if shard not in self._handles:
            self._handles[shard] = safe_open(self.folder / shard, framework="pt")
        handle = self._handles[shard]
        tensor: Tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[index]
        return tensor.clone()  # the original is a view of the mapped file that later reads would share

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    def identity(self, name: str, revision: str | None = None) -> ModelIdentity:
        """What artifacts say of this checkpoint: `name` as it was written, the hub's commit if it has one.

        The fingerprint covers config.json, every tensor's name, dtype and shape, and the bytes of all
        routers, which differ between any two models of one shape and are small.

        Raises:
            ConfigError: a router is not where the family's naming has it.
        """
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE and not k.startswith("_")}
        total = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
        for tensor, entry in sorted(self.entries.items()):
            total.update(f"{tensor} {entry.dtype} {entry.shape}\n".encode())
        for layer in self.shape.moe_layers:
            total.update(_raw(self.read(self._router(layer))))
        return ModelIdentity(
            name=name,
            revision=self.folder.name if self.folder.parent.name == "snapshots" else revision,
            model_type=self.family.model_type,
            num_parameters=self.num_parameters,
            fingerprint=total.hexdigest(),
        )

    def _router(self, layer: int) -> str:
        name = self.family.router_tensor(layer)
        if name not in self.files:
            pattern = re.compile(rf"\.{layer}\..*\b(gate|router)\.weight$")
            similar = [other for other in sorted(self.files) if pattern.search(other)] or [
                "none in that layer"
            ]
            raise ConfigError(
                f"{self.folder}: router {name!r} is missing, which every {self.family.model_type} checkpoint "
                f"on the hub has; routers here: {', '.join(similar)}"
            )
        return name


def header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises ConfigError where it is missing or truncated."""
    try:  # opening checks that the offsets cover the file
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: truncated, or not a safetensors file ({error})") from error
    if not text.rstrip(b" ").endswith(b"}"):
        raise ConfigError(f"{path}: the header is padded with something else than spaces")
    document = json.loads(text)
    metadata = document.pop("__metadata__", {})
    data = 8 + length
    entries = {
        n: Entry(v["dtype"], tuple(v["shape"]), data + v["data_offsets"][0]) for n, v in document.items()
    }
    return entries, metadata


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and raw little-endian bytes: equal exactly for bitwise equal tensors."""
    total = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    total.update(_raw(tensor))
    return total.hexdigest()


def rewrite(base: Checkpoint, replacements: Mapping[str, Tensor], out: Path) -> None:
    """Write `base` with the tensors in `replacements` exchanged as the complete folder `out`.

    All is written to `.OUT.*.partial` beside it, read back, fsynced and renamed: an interruption leaves no
    `out` (a kill leaves the partial folder, which may be deleted).

    Raises:
        MismatchError: a name that `base` does not have, or another dtype or shape than it stores.
        ConfigError: `out` exists and is not empty.
    """
    for name, tensor in replacements.items():
        _require_like(base, name, tensor)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; a checkpoint is written to a new folder only")
    with _aside(out.resolve()) as folder:
        for path in _companions(base.folder):
            _copy(path, folder / path.name, {})
        for shard in sorted(set(base.files.values())):
            changed = {base.entries[n].start: t for n, t in replacements.items() if base.files[n] == shard}
            _copy(base.folder / shard, folder / shard, changed)
        written = Checkpoint(folder)
        for name, tensor in replacements.items():
            if digest(written.read(name)) != digest(tensor):
                raise OSError(f"{folder}: tensor {name!r} reads back differently; is the disk broken?")


def _require_like(base: Checkpoint, name: str, tensor: Tensor) -> None:
    stored = base.read(name)
    if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
        raise MismatchError(
            f"tensor {name!r}: {base.folder} stores {stored.dtype} {tuple(stored.shape)}, "
            f"the replacement is {tensor.dtype} {tuple(tensor.shape)}"
        )


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` where the block ends, and is removed where it fails."""
    folder = out.with_name(f".{out.name}.{uuid4().hex[:12]}.partial")
    folder.mkdir(parents=True)
    try:
        yield folder
        sync(folder)
        folder.rename(out)  # also onto an empty folder
        sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(source: Path, target: Path, changed: Mapping[int, Tensor]) -> None:
    """Copy a file (no link: `out` must outlive it), then overwrite the tensors at these byte offsets."""
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        for start, tensor in changed.items():
            file.seek(start)
            file.write(_raw(tensor))
    sync(target)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _companions(folder: Path) -> list[Path]:
    """The files that belong to the checkpoint beside its shards; an index only where it is the one in use."""
    index = None if (folder / SINGLE).is_file() else INDEX
    paths = {path for pattern in (*COMPANIONS, "LICENSE*") for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in paths if not path.name.endswith(".index.json") or path.name == index)


def _read_headers(folder: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """(tensor -> shard, tensor -> entry); a single file wins over an index, as in transformers."""
    if (folder / SINGLE).is_file():
        entries, _ = header(folder / SINGLE)
        return dict.fromkeys(entries, SINGLE), entries
    files = _read_index(folder)
    headers = {shard: header(folder / shard)[0] for shard in sorted(set(files.values()))}
    for name, shard in files.items():
        if name not in headers[shard]:
            raise ConfigError(f"{folder / shard}: tensor {name!r} is missing, which {INDEX} places here")
    return files, {name: headers[shard][name] for name, shard in files.items()}


def _read_index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:3]) or "no weights"
        raise ConfigError(f"{folder}: safetensors only; expected {SINGLE} or {INDEX}, found {found}")
    files = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ConfigError(f"{folder / INDEX}: weight_map must map tensors to files, found {str(files)[:50]}")
    for shard in files.values():
        if Path(str(shard)).name != shard:
            raise ConfigError(f"{folder / INDEX}: weight_map must name files of this folder, found {shard!r}")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as a JSON object ({error})") from error


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; torch and safetensors both are little-endian."""
    import torch

    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)
