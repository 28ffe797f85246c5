"""Which tensors differ, bit for bit, between two checkpoint folders."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seuf_ray.checkpoint.folder import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same, bit for bit, in two checkpoints.

    Attributes:
        name: checkpoint name, with `[5]` for slice 5 of a tensor that holds all experts of a layer.
        num_different: values that differ; all of them where the tensor is in one checkpoint only.
        max_difference: largest absolute difference; NaN where values cannot be compared.
        note: what else differs: `only in A`, `F32 in A, BF16 in B`.
    """

    name: str
    num_different: int
    max_difference: float
    shape: tuple[int, ...]
    note: str = ""


def diff(a: Path, b: Path) -> list[Difference]:
    """Every tensor that differs between two folders, layer by layer; one at a time is in memory."""
    return _diff(Checkpoint(a), Checkpoint(b))


def _diff(left: Checkpoint, right: Checkpoint) -> list[Difference]:
    return [found for name in _names(left, right) for found in _compare(name, left, right)]


def _names(left: Checkpoint, right: Checkpoint) -> list[str]:
    """All names of both, layer 2 before layer 10."""
    names = left.files.keys() | right.files.keys()
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def _slices(name: str, shape: Sequence[int]) -> list[tuple[str, int | None]]:
    """(label, index) of the units that are compared: experts, also where all of a layer are in one tensor."""
    if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) and len(shape) == 3:
        return [(f"{name}[{index}]", index) for index in range(shape[0])]
    return [(name, None)]


def _compare(name: str, left: Checkpoint, right: Checkpoint) -> Iterator[Difference]:
    if name not in left.files or name not in right.files:
        side, letter = (left, "A") if name in left.files else (right, "B")
        for label, index in _slices(name, side.info(name)[1]):
            shape = side.info(name)[1][0 if index is None else 1 :]
            yield Difference(label, math.prod(shape), math.nan, shape, f"only in {letter}")
        return
    (dtype_a, shape_a), (dtype_b, shape_b) = left.info(name), right.info(name)
    if shape_a != shape_b:
        yield Difference(name, math.prod(shape_a), math.nan, shape_a, f"{shape_a} in A, {shape_b} in B")
        return
    note = "" if dtype_a == dtype_b else f"{dtype_a} in A, {dtype_b} in B"
    for label, index in _slices(name, shape_a):
        yield from _differing(label, left.read(name, index), right.read(name, index), note)


def _differing(label: str, x: Tensor, y: Tensor, note: str) -> Iterator[Difference]:
    import torch

    if x.dtype == y.dtype:  # as bits: NaN equals itself, and -0.0 is not 0.0, as in the digests
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        differs = x.view(bits) != y.view(bits)
    else:
        differs = x.double() != y.double()
    if note or bool(differs.any()):
        gaps = (x[differs].double() - y[differs].double()).abs()
        largest = float(gaps.max()) if gaps.numel() else 0.0
        yield Difference(label, len(gaps), largest, tuple(x.shape), note)


def print_diff(a: Path, b: Path, as_json: bool) -> None:
    """A table, or JSON `{"num_tensors": 63, "differences": [...]}`, on stdout."""
    left, right = Checkpoint(a), Checkpoint(b)
    sides = [(name, left if name in left.files else right) for name in _names(left, right)]
    total = sum(len(_slices(name, side.info(name)[1])) for name, side in sides)
    found = _diff(left, right)
    if as_json:
        rows = [{**asdict(d), "max_difference": _finite(d.max_difference)} for d in found]
        print(json.dumps({"num_tensors": total, "differences": rows}, indent=1))
        return
    width = max([len(d.name) for d in found], default=0)
    for d in found:
        values = f"{d.num_different} of {math.prod(d.shape)} values differ"
        print(
            f"{d.name:<{width}}  {d.shape!s:>14}  {values:>36}  max {d.max_difference:.3e}  {d.note}".rstrip()
        )
    print(f"{len(found)} of {total} tensors differ")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
