"""The helpers of the tests themselves: pairs of processes, and the session's Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist


def _sum_over_ranks(value: float) -> tuple[int, float]:
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("rank 1 is unwell")


def test_ranks_add_up(two_processes: Callable[..., list[Any]]) -> None:
    assert two_processes(_sum_over_ranks, 10.0) == [(0, 30.0), (1, 30.0)]


def test_one_process_is_a_group_too() -> None:
    assert distributed.run(_sum_over_ranks, 1, 10.0) == [(0, 10.0)]


def test_a_failing_rank_is_heard() -> None:
    with pytest.raises(
        RuntimeError, match=r"(?s)rank 1 of 2.*_fail_on_rank_1.*ArithmeticError: rank 1 is unwell"
    ):
        distributed.run(_fail_on_rank_1)


def test_ray_is_real_and_keeps_to_itself(ray_session: None) -> None:
    import ray

    pid = ray.get(ray.remote(lambda: os.getpid()).remote())
    assert pid != os.getpid()
    assert ray.cluster_resources()["CPU"] == 4
    assert not Path(os.environ["RAY_AUTH_TOKEN_PATH"]).is_relative_to(Path.home())
