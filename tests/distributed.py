"""Runs a function on several real processes that talk over gloo, as a cluster's workers would.

Each run has fresh processes, forked from one that has imported what they need: that takes longer than most functions.

def _sum(value): ...                      # module level, so that another process can import it
assert run(_sum, 2, 1.0) == [3.0, 3.0]
"""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=120)
mp.set_forkserver_preload(
    ["tasks", "transformers.modeling_utils", "deepspeed", "seuf_ray.engine.deepspeed_engine"]
)


def run(function: Callable[..., Any], world_size: int = 2, *args: Any) -> list[Any]:
    """What `function(*args)` returns on each rank of a gloo group.

    Raises:
        RuntimeError: with the traceback of the rank that failed first; the others only lose their connection to it.
    """
    with tempfile.TemporaryDirectory(prefix="gloo") as folder:
        try:
            mp.start_processes(
                _worker, (world_size, folder, function, args), world_size, start_method="forkserver"
            )
        except mp.ProcessRaisedException as error:
            first = Path(folder) / "first_error"
            raise RuntimeError(first.read_text() if first.exists() else str(error)) from None
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]


def _worker(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",  # nobody listens: ranks meet in the file store
    )
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        _result(folder, rank).write_bytes(pickle.dumps(function(*args)))
        dist.barrier()  # a rank that is done must not close connections others still use
    except BaseException:
        with suppress(FileExistsError), (Path(folder) / "first_error").open("x") as file:
            file.write(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result{rank}"
