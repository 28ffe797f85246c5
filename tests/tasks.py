"""Small plans, batches and runs that several tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seuf_ray.artifacts import Expert, Provenance, UnlearningPlan
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.config import ClusterConfig, TrainingConfig
from seuf_ray.engine import LocalEngine
from seuf_ray.families import PARTS
from seuf_ray.model.moe import MoEModel
from seuf_ray.passes import Batch

LEARNING_RATE = 1e-2


def make_plan(checkpoint: Checkpoint, experts: list[Expert], *, routers: bool = True) -> UnlearningPlan:
    """A plan for these experts and their routers; for everything if there are none."""
    family = checkpoint.family
    layers = sorted({layer for layer, _ in experts})
    names = [family.expert_tensor(layer, e, part) for layer, e in experts for part in PARTS]
    names += [family.router_tensor(layer) for layer in layers] if routers else []
    return UnlearningPlan(
        model=checkpoint.identity("tiny"),
        provenance=Provenance(seed=0, made_from={}, packages={}),
        scope="explicit" if experts else "full",
        top_m=1,
        experts=experts,
        routers=layers if routers else [],
        tensors=sorted(names),
        num_trainable=1,
        trainable_fraction=0.1,
    )


def random_batch(rows: int = 5, length: int = 12, seed: int = 0) -> Batch:
    """Rows of unequal length, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (rows, length), generator=generator)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    attention = torch.arange(length)[None] < lengths
    counted = attention.clone()
    counted[:, 0] = False
    return Batch(ids, attention, counted)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch; a filler for none."""
    if not rows:
        return rows_of(batch, [0]).filler()
    return Batch(batch.ids[rows], batch.attention[rows], batch.counted[rows])


def ascend(engine: LocalEngine, batch: Batch) -> float:
    """One step of gradient ascent; the gradient norm."""
    engine.backward(-engine.forward(batch, grad=True).nll())
    return engine.step(LEARNING_RATE)


def train_local(
    folder: Path, experts: list[Expert], steps: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Gradient ascent in one process; the trained tensors."""
    checkpoint = Checkpoint(folder)
    engine = LocalEngine(MoEModel(checkpoint, dtype), make_plan(checkpoint, experts), TrainingConfig())
    for step in range(steps):
        ascend(engine, random_batch(seed=step))
    return engine.tensors()


def each(function: Callable[..., Any], jobs: list[tuple]) -> list[Any]:
    """`function` of every job, one after the other in the same processes: to start them takes longer than most jobs."""
    return [function(*job) for job in jobs]


def train_rank(folder: str, experts: list[Expert], cluster: dict, dtype: torch.dtype = torch.float32) -> dict:
    """The same on one rank of a DeepSpeed engine; also gradient norms, reference passes and dtypes."""
    from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine, owned_experts

    torch.set_num_threads(1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checkpoint = Checkpoint(Path(folder))
    owned = owned_experts(checkpoint.shape.num_experts, rank, cluster["expert_parallel_size"])
    model = MoEModel(checkpoint, dtype, owned=owned)
    plan = make_plan(checkpoint, experts)
    engine = DeepSpeedEngine(model, plan, TrainingConfig(), ClusterConfig(**cluster))
    norms, reference = [], []
    for step in range(3):
        mine = rows_of(random_batch(seed=step), list(range(rank, 5, world_size)))
        norms.append(ascend(engine, mine))
        reference.append(engine.forward(mine, reference=True).logps)
    return {
        "tensors": engine.tensors(),
        "norms": norms,
        "reference": reference,
        "trained": {parameter.dtype for parameter in engine.parameters()},
        "state": {tensor.dtype for tensor in tensors_in(engine.state())},
        "frozen": {parameter.dtype for parameter in model.module.parameters() if not parameter.requires_grad},
    }


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def interrupted_rank(folder: str, experts: list[Expert], cluster: dict) -> dict[str, Tensor]:
    """Two steps, a saved state, one step that is undone by going back to it, and the third step again."""
    from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine

    class Partitioned(DeepSpeedEngine):
        """ZeRO 3 leaves small parameters whole; here it must not."""

        def _deepspeed_config(self) -> dict:
            config = super()._deepspeed_config()
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            return config

    torch.set_num_threads(1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checkpoint = Checkpoint(Path(folder))
    engine = Partitioned(
        MoEModel(checkpoint), make_plan(checkpoint, experts), TrainingConfig(), ClusterConfig(**cluster)
    )
    batches = [rows_of(random_batch(seed=step), list(range(rank, 5, world_size))) for step in range(4)]
    for step in (0, 1):
        ascend(engine, batches[step])
    saved = engine.state()
    before = engine.tensors()
    ascend(engine, batches[3])
    engine.load_state(saved)
    again = engine.tensors()
    assert all(torch.equal(again[name], before[name]) for name in before)
    ascend(engine, batches[2])
    return engine.tensors()


def broken_rank(folder: str, experts: list[Expert], cluster: dict) -> tuple[float, list[str], bool]:
    """A step whose gradient is 0/0 on the last rank alone: its norm, who is named, and whether nothing moved."""
    from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine

    checkpoint = Checkpoint(Path(folder))
    plan = make_plan(checkpoint, experts)
    engine = DeepSpeedEngine(MoEModel(checkpoint), plan, TrainingConfig(), ClusterConfig(**cluster))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch, before = rows_of(random_batch(), list(range(rank, 5, world_size))), engine.tensors()
    forward = engine.forward(batch, grad=True)
    nothing = forward.logps.sum() * 0.0
    engine.backward(forward.nll() + (nothing.sqrt() if rank == world_size - 1 else nothing))
    norm, after = engine.step(LEARNING_RATE), engine.tensors()
    return norm, engine.broken_gradients(), all(torch.equal(after[name], before[name]) for name in before)
