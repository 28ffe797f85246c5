"""Safetensors files by their bytes: headers, single tensors, digests, and copies with a few tensors exchanged.

    shard = u64 length of the header | JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes

Tensors are read with ordinary reads straight into the memory that will hold them. A mapped file would count as
resident memory besides, page by page, until it is closed. Torch loads where tensors are touched.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from seuf_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE = "_scale_inv"
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Entry(NamedTuple):
    """A tensor in a shard's header: dtype in safetensors' words (F32, BF16), and the byte it begins at."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises ConfigError for a dtype that torch reads from no safetensors file."""
        import torch

        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype {self.dtype} is unknown; allowed: {', '.join(_DTYPES)}")
        dtype: torch.dtype = getattr(torch, _DTYPES[self.dtype])
        return dtype

    def at(self, index: int) -> Entry:
        """The slice `[index]` along the first dimension."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"index {index} is outside of 0..{self.shape[0] - 1}")
        size = math.prod(self.shape[1:]) * self.torch_dtype.itemsize
        return Entry(self.dtype, self.shape[1:], self.start + index * size)


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


def headers(folder: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """(tensor -> shard, tensor -> entry); a single file wins over an index, as in transformers."""
    if (folder / SINGLE).is_file():
        entries, _ = header(folder / SINGLE)
        return dict.fromkeys(entries, SINGLE), entries
    files = _read_index(folder)
    found = {shard: header(folder / shard)[0] for shard in sorted(set(files.values()))}
    for name, shard in files.items():
        if name not in found[shard]:
            raise ConfigError(f"{folder / shard}: tensor {name!r} is missing, which {INDEX} places here")
    return files, {name: found[shard][name] for name, shard in files.items()}


def take_scales(
    folder: Path, files: dict[str, str], entries: dict[str, Entry], block: tuple[int, int]
) -> dict[str, tuple[str, Entry]]:
    """Move the scales of block-scaled float8 tensors out of `files` and `entries`.

    Returns:
        name of the tensor they scale -> (shard, entry).

    Raises:
        ConfigError: scales are missing, or have another dtype or shape than one float32 per block.
    """
    weights = {name: entry.shape for name, entry in entries.items() if entry.dtype == "F8_E4M3"}
    for name, shape in weights.items():
        scale, blocks = (
            name + SCALE,
            tuple(-(-size // step) for size, step in zip(shape, block, strict=False)),
        )
        if scale not in entries:
            raise ConfigError(f"{folder}: tensor {scale!r} is missing, the scales of the float8 {name!r}")
        if len(shape) != 2 or entries[scale][:2] != ("F32", blocks):
            found = "{} {}".format(*entries[scale])
            raise ConfigError(
                f"{folder}: {scale!r} is {found}; {shape} in blocks of {block} has F32 {blocks}"
            )
    return {name: (files.pop(name + SCALE), entries.pop(name + SCALE)) for name in weights}


def _read_index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:3]) or "no weights"
        raise ConfigError(f"{folder}: safetensors only; expected {SINGLE} or {INDEX}, found {found}")
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ConfigError(f"{folder / INDEX}: weight_map must map tensors to files, found {str(files)[:50]}")
    for shard in files.values():
        if Path(str(shard)).name != shard:
            raise ConfigError(f"{folder / INDEX}: weight_map must name files of this folder, found {shard!r}")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ConfigError for anything else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as a JSON object ({error})") from error


def read(path: Path, entry: Entry) -> Tensor:
    """The tensor of that entry, in memory of its own."""
    import torch

    tensor = torch.empty(entry.shape, dtype=entry.torch_dtype)
    read_into(path, entry, tensor)
    return tensor


def read_into(path: Path, entry: Entry, tensor: Tensor) -> None:
    """Fill a contiguous `tensor` on the CPU, which has the entry's dtype and shape.

    Raises:
        ConfigError: the file is gone, or has become shorter than its header said.
    """
    target = raw(tensor)
    try:
        with path.open("rb") as file:
            file.seek(entry.start)
            count = file.readinto(target)
    except OSError as error:
        raise ConfigError(f"{path}: not readable ({error})") from error
    if count != len(target):
        raise ConfigError(f"{path}: truncated, {len(target) - count} bytes of a tensor are missing")


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """bfloat16(weight * scale), one scale per block of the matrix.

    Args:
        weight: (M, N) float8.
        scale: (ceil(M / block[0]), ceil(N / block[1])) float32; blocks at the edges may be partial.

    Only one row of blocks is in float32 at a time.
    """
    import torch

    rows, columns = block
    values = torch.empty(weight.shape, dtype=torch.bfloat16)
    for index, scales in enumerate(scale):
        part = slice(index * rows, (index + 1) * rows)
        values[part] = weight[part].float() * scales.repeat_interleave(columns)[: weight.shape[1]]
    return values


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and raw little-endian bytes: equal exactly for bitwise equal tensors."""
    total = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    total.update(raw(tensor))
    return total.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; torch and safetensors both are little-endian.

    They are the tensor's own memory where it is contiguous and on the CPU.
    """
    import torch

    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)


def copy(source: Path, target: Path, changed: Mapping[int, Tensor]) -> None:
    """Copy a file (no link: the copy must outlive it), then overwrite the tensors at these byte offsets."""
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        for start, tensor in changed.items():
            file.seek(start)
            file.write(raw(tensor))
    sync(target)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
