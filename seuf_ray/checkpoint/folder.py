"""Hugging Face folders by tensor name: lazy reads, and whole copies with a few tensors exchanged.

    folder = config.json | model.safetensors, or model.safetensors.index.json and shards | tokenizer files

Only headers are read until a tensor is asked for, so a checkpoint of 671 B parameters opens in seconds. A
replaced tensor keeps its dtype and shape, hence its place in the shard: `rewrite` copies every file and
overwrites those bytes only, which needs the memory of one tensor and leaves all others bit for bit as they
were. Pickles and code are neither read nor copied. torch loads where tensors are touched: `--help` is quick.

Block-scaled float8 (DeepSeek-V3) is read as the bfloat16 that it stands for:

    name (M, N) F8_E4M3 | name_scale_inv (ceil(M / 128), ceil(N / 128)) F32 -> bfloat16(weight * scale of its block)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from seuf_ray import embedded
from seuf_ray.artifacts import ModelIdentity
from seuf_ray.checkpoint import shards
from seuf_ray.checkpoint.shards import INDEX, SINGLE, Entry, digest
from seuf_ray.errors import ConfigError, MismatchError
from seuf_ray.families import family_of, shape_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["INDEX", "SINGLE", "Checkpoint", "Entry", "digest", "resolve", "rewrite"]

COMPANIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")  # config, tokenizer, chat template
# Who saved it and how to load it, not what it is.
_VOLATILE = {"transformers_version", "torch_dtype", "dtype"}


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
        files: tensor name -> file name of the shard that holds it; scales of float8 tensors are not among them.
        entries: tensor name -> what the shard's header says of it.
        scales: name of a block-scaled float8 tensor -> (shard, entry) of its scales.
        block: rows and columns that share a scale.

    Raises:
        ConfigError: an unknown family, an incomplete config.json, pickles only, a missing, truncated or
            incomplete shard, or a float8 tensor without scales of the right shape.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = shards.read_json(folder / "config.json")
        try:
            self.family, self.shape = family_of(self.config), shape_of(self.config)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from error
        self.files, self.entries = shards.headers(folder)
        self.block = self._block_size()
        self.scales = shards.take_scales(folder, self.files, self.entries, self.block)

    def _block_size(self) -> tuple[int, int]:
        block = (self.config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
        if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
            raise ConfigError(
                f"{self.folder}: weight_block_size must be two positive integers, found {block}"
            )
        return block[0], block[1]

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape) as stored, as in `("BF16", (32, 64))`; raises MismatchError where there is no such tensor."""
        if name not in self.entries:
            raise MismatchError(f"{self.folder} has no tensor {name!r}, only {len(self.entries)} others")
        return self.entries[name][:2]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or its slice `[index]` along the first dimension, in memory of its own; float8 as bfloat16.

        Raises:
            MismatchError: there is no such tensor.
            ConfigError: its shard is gone or truncated.
        """
        self.info(name)
        path, entry = self.folder / self.files[name], self.entries[name]
        if name not in self.scales:
            return shards.read(path, entry if index is None else entry.at(index))
        shard, scale_entry = self.scales[name]
        scale = shards.read(self.folder / shard, scale_entry)
        tensor = shards.dequantise(shards.read(path, entry), scale, self.block)
        return tensor if index is None else tensor[index].clone()

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill `target`, which has the tensor's shape, casting to its dtype; without a copy where there is no cast."""
        entry = self.entries[name]
        is_plain = name not in self.scales and target.is_contiguous() and target.device.type == "cpu"
        if is_plain and target.dtype == entry.torch_dtype:
            shards.read_into(self.folder / self.files[name], entry, target)
        else:
            target.copy_(self.read(name))

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    @property
    def shard_names(self) -> list[str]:
        return sorted({*self.files.values(), *(shard for shard, _ in self.scales.values())})

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
            total.update(shards.raw(self.read(self._router(layer))))
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
            similar = [other for other in sorted(self.files) if pattern.search(other)]
            raise ConfigError(
                f"{self.folder}: router {name!r} is missing, which every {self.family.model_type} checkpoint "
                f"on the hub has; routers here: {', '.join(similar) or 'none in that layer'}"
            )
        return name


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
            shards.copy(path, folder / path.name, {})
        for shard in base.shard_names:
            changed = {base.entries[n].start: t for n, t in replacements.items() if base.files[n] == shard}
            shards.copy(base.folder / shard, folder / shard, changed)
        written = Checkpoint(folder)
        for name, tensor in replacements.items():
            if digest(written.read(name)) != digest(tensor):
                raise OSError(f"{folder}: tensor {name!r} reads back differently; is the disk broken?")


def _require_like(base: Checkpoint, name: str, tensor: Tensor) -> None:
    _, shape = base.info(name)
    dtype = base.entries[name].torch_dtype
    if name in base.scales or (dtype, shape) != (tensor.dtype, tuple(tensor.shape)):
        scaled = " in scaled blocks" if name in base.scales else ""
        raise MismatchError(
            f"tensor {name!r}: {base.folder} stores {dtype} {shape}{scaled}, "
            f"the replacement is {tensor.dtype} {tuple(tensor.shape)}"
        )


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` where the block ends, and is removed where it fails."""
    folder = out.with_name(f".{out.name}.{uuid4().hex[:12]}.partial")
    folder.mkdir(parents=True)
    try:
        yield folder
        shards.sync(folder)
        folder.rename(out)  # also onto an empty folder
        shards.sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _companions(folder: Path) -> list[Path]:
    """The files that belong to the checkpoint beside its shards; an index only where it is the one in use."""
    index = None if (folder / SINGLE).is_file() else INDEX
    paths = {path for pattern in (*COMPANIONS, "LICENSE*") for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in paths if not path.name.endswith(".index.json") or path.name == index)
