"""What all ranks of the process group agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Element-wise sum of every rank's `values`, where they were."""
    summed = values.detach().to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(values.device)


def mean_over_ranks(size: int, device: torch.device) -> int:
    """The same number on every rank, so that their caches decide alike."""
    total = sum_over_ranks(torch.tensor(float(size), dtype=torch.float64), device)
    return int(total / dist.get_world_size())
