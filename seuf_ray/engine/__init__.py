"""A model, what of it trains, and where that runs.

protocol          what the unlearning loop needs
local             its meaning in one process
deepspeed_engine  expert parallelism and ZeRO 0-3 over many processes
replicated        a process group whose base stays over many trials
ranks             what all ranks of a group agree on
"""

from seuf_ray.engine.local import LocalEngine
from seuf_ray.engine.protocol import Engine, State

__all__ = ["Engine", "LocalEngine", "State"]
