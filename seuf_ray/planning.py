"""Memory, traffic and arithmetic of a job before it runs; refuses what cannot fit.

    weights of a worker  = (shared part + routed experts / expert_parallel_size) * bytes of model.dtype
    trained state        = 16 bytes a parameter: float32 value, gradient, AdamW's two moments (ZeRO divides them)
    activations          = tokens * bytes of model.dtype * KEPT * (numbers that the layers' matrices give out)
    arithmetic           = 2 * tokens * (parameters that a token meets) forward, and as much backward

The first two are sizes, the others estimates, and are called so. Frozen matrices have no gradient, so a layer keeps
little more than their outputs: 1.1 to 2.0 times as much over the families here (by `saved_tensors_hooks`), and 2.1 to
4.3 times where everything trains. Rows are taken to be full and cached prefixes to be there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from seuf_ray.artifacts import UnlearningPlan
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.checkpoint.sizes import ITEMSIZE, ModelSize, readable
from seuf_ray.config import ClusterConfig, JobConfig
from seuf_ray.errors import ConfigError
from seuf_ray.model.moe import HEAD_TOKENS
from seuf_ray.passes import Targets
from seuf_ray.plugins import Reads
from seuf_ray.resources import Memory, Resources
from seuf_ray.unlearning import reads_of

KEPT, KEPT_TRAINED = 1.5, 3.0  # middle of the measured ranges above
HEAD = 12  # bytes per token and word: float32 logits, and two more of their size in the backward pass
PROCESS = 600 * 2**20  # bytes of a process that has imported torch, transformers and ray (measured on Linux)
MARGIN = 1.1  # weights so many times over what is at hand are refused: what is at hand is an estimate, too

AttributionEngine = Literal["actors", "expert_parallel", "streamed"]


@dataclass(frozen=True)
class AttributionNeeds:
    """Memory of one process of each attribution engine."""

    actors: Memory
    expert_parallel: Memory
    streamed: Memory

    @classmethod
    def of(cls, config: JobConfig, size: ModelSize) -> AttributionNeeds:
        """With one unit under way; hidden states between layers are bounded, and none but a streamed pass has them."""
        item, parallel = ITEMSIZE[config.model.dtype], config.cluster.expert_parallel_size
        tokens = config.attribution.unit_rows * config.data.sequence_length
        passing = int(tokens * item * max(layer.outputs for layer in size.layers))
        layer = size.largest_layer(item)
        rank = size.weights(item, parallel) + size.largest_layer(item, parallel)
        gpus, hidden = config.cluster.gpus_per_worker, config.attribution.hidden_bytes
        return cls(
            actors=_memory(size.weights(item) + passing, layer, gpus),
            expert_parallel=_memory(rank + passing, rank, gpus),  # experts are taken apart on the host
            streamed=_memory(layer + passing, layer, gpus) + Memory(hidden),
        )


def _memory(working: int, loading: int, gpus: float) -> Memory:
    return Memory(PROCESS + loading, working) if gpus else Memory(PROCESS + working)


def choose_engine(
    needs: AttributionNeeds, resources: Resources, config: JobConfig
) -> tuple[AttributionEngine, str]:
    """The fastest attribution engine that fits, and why, in one sentence with the numbers."""
    actor = resources.share(config.attribution.num_actors, config.cluster)
    if needs.actors.fits(actor):
        return "actors", f"an actor needs {needs.actors} for the whole model and has {actor}"
    too_large = f"an actor would need {needs.actors} for the whole model and has {actor}"
    group, parallel = config.cluster.num_workers, config.cluster.expert_parallel_size
    worker = resources.share(group, config.cluster)
    if parallel > 1 and needs.expert_parallel.fits(worker):
        part = f"a worker with 1/{parallel} of the experts needs {needs.expert_parallel} and has {worker}"
        return "expert_parallel", f"{too_large}; {part}"
    part = f"one of {group} workers would need {needs.expert_parallel} and has {worker}"
    why_not = part if parallel > 1 else "cluster.expert_parallel_size = 1 divides no experts"
    return "streamed", f"{too_large}; {why_not}; one layer at a time needs {needs.streamed}"


@dataclass(frozen=True)
class UnlearningNeeds:
    """What training takes: bytes of one worker (`patch`: of the result), and operations of a step on all of them.

    Attributes:
        weights: of the frozen model.
        state: of what trains: values, gradients, AdamW's moments.
        activations: what the passes of a step keep for the backward pass, at most.
        cache: what it may keep of frozen layers and of the original's answers, at most.
        reads: from the checkpoint, once.
        traffic: to other workers, a step.
    """

    weights: int
    state: int
    activations: int
    cache: int
    reads: int
    traffic: int
    flops: float
    patch: int

    @property
    def memory(self) -> int:
        """Bytes of one worker, all in all."""
        return self.weights + self.state + self.activations + self.cache

    @classmethod
    def of(
        cls, config: JobConfig, checkpoint: Checkpoint, plan: UnlearningPlan, targets: Targets
    ) -> UnlearningNeeds:
        """Of training `plan` as `config` says; `targets` is what the plan means to the losses."""
        size, cluster, item = ModelSize.of(checkpoint), config.cluster, ITEMSIZE[config.model.dtype]
        asked = reads_of([config.algorithm, config.anchor], targets)
        passes = [Pass(config, size, plan, asked[name]) for name in asked if not name.endswith("_ref")]
        gradient = item if plan.is_in_place else 4
        reduced = 2 * plan.num_trainable * gradient * (cluster.num_workers - 1) // cluster.num_workers
        return cls(
            weights=size.weights(item, cluster.expert_parallel_size),
            state=state_bytes(plan, cluster, item),
            activations=sum(one.activations for one in passes),
            cache=0 if plan.is_full else config.engine.prefix_cache_bytes,
            reads=size.stored(cluster.expert_parallel_size),
            traffic=reduced + sum(one.exchanged for one in passes),
            flops=sum(one.flops for one in passes),
            patch=patch_bytes(checkpoint, plan),
        )


class Pass:
    """One pass with gradients over a full batch, from the lowest layer that trains to the deepest that is read."""

    def __init__(self, config: JobConfig, size: ModelSize, plan: UnlearningPlan, reads: Reads) -> None:
        self.config, self.size, self.is_in_place = config, size, plan.is_in_place
        self.layers = size.layers[plan.first_layer : reads.depth]
        self.has_head = reads.depth is None
        self.item = ITEMSIZE[config.model.dtype]
        self.tokens = config.training.batch_size * config.data.sequence_length

    @property
    def activations(self) -> int:
        """Bytes on one worker, of one part of the batch."""
        rows = -(-self.config.training.batch_size // self.config.cluster.num_workers)
        tokens = min(rows, self.config.engine.micro_batch_size or rows) * self.config.data.sequence_length
        kept = [layer.outputs * (KEPT_TRAINED if self.is_in_place else KEPT) for layer in self.layers]
        at_once = tokens
        if self.config.engine.gradient_checkpointing:  # each layer's input, and all of one layer at a time
            kept, at_once = [max(kept, default=0.0), self.size.width * len(kept)], min(tokens, HEAD_TOKENS)
        head = HEAD * self.size.vocabulary * at_once * self.has_head
        return int(tokens * self.item * sum(kept)) + head

    @property
    def flops(self) -> float:
        """Over all workers; weight gradients, where the model itself trains, are a third product."""
        active = sum(layer.active for layer in self.layers)
        head = self.size.width * self.size.vocabulary * self.has_head
        return 2.0 * (3 if self.is_in_place else 2) * self.tokens * (active + head)

    @property
    def exchanged(self) -> int:
        """Bytes that one worker sends to the experts of others, and back, forward and backward."""
        cluster, shape = self.config.cluster, self.size.shape
        share = 1 - 1 / cluster.expert_parallel_size
        moe_layers = sum(layer.experts > 0 for layer in self.layers)
        rows = self.tokens * shape.top_k * moe_layers / cluster.num_workers
        return int(4 * share * rows * self.size.width * self.item)


def state_bytes(plan: UnlearningPlan, cluster: ClusterConfig, itemsize: int) -> int:
    """Bytes that one worker keeps for what trains.

    Without ZeRO: float32 value, gradient and two moments. ZeRO adds a float32 master and divides it and the moments
    over the workers, stage 2 the gradients too, stage 3 the values as well. A baseline that trains in place has its
    values in the weights, keeps gradients and moments in `model.dtype`, and beside them a copy of the original.
    """
    if plan.is_in_place:
        return 4 * itemsize * plan.num_trainable
    stage, workers = cluster.zero_stage if cluster.uses_deepspeed else 0, cluster.num_workers
    whole = (4 if stage < 3 else 0) + (4 if stage < 2 else 0) + (8 if stage < 1 else 0)
    divided = 16 - whole + (4 if stage else 0)
    return plan.num_trainable * whole + -(-plan.num_trainable * divided // workers)


def patch_bytes(checkpoint: Checkpoint, plan: UnlearningPlan) -> int:
    """Bytes of the tensors of `patch.safetensors`, in the checkpoint's own dtypes."""
    if plan.is_full:
        return ModelSize.of(checkpoint).stored()
    entries = (checkpoint.entries[name] for name in plan.tensors)
    return sum(math.prod(entry.shape) * entry.torch_dtype.itemsize for entry in entries)


def require_room(needs: UnlearningNeeds, resources: Resources, config: JobConfig, size: ModelSize) -> None:
    """Refuse weights that cannot fit.

    Raises:
        ConfigError: with the numbers, and what to change.
    """
    cluster, there = config.cluster, resources.share(config.cluster.num_workers, config.cluster)
    sharded = (
        cluster.expert_parallel_size > 1
    )  # such a worker sorts its experts on the host before it uses a GPU
    for what, has in (("GPU", there.device), ("node", there.host)):
        if (what == "GPU" or sharded or not cluster.gpus_per_worker) and 0 < has * MARGIN < needs.weights:
            raise ConfigError(
                f"model.name {config.model.name!r}: one of cluster.num_workers = {cluster.num_workers} workers needs "
                f"{readable(needs.weights)} for weights in {config.model.dtype}, its {what} gives it {readable(has)}; "
                f"routed experts are {size.experts / size.parameters:.0%} of the model: raise "
                f"cluster.expert_parallel_size (now {cluster.expert_parallel_size}) and cluster.num_workers on more "
                f"nodes{_or_bfloat16(config)}"
            )


def _or_bfloat16(config: JobConfig) -> str:
    return ", or set model.dtype = 'bfloat16'" if config.model.dtype == "float32" else ""


def plan_summary(
    config: JobConfig, size: ModelSize, needs: UnlearningNeeds, resources: Resources
) -> list[tuple[str, str]]:
    """What training needs, as lines (name, text) for people."""
    cluster, steps = config.cluster, config.training.steps
    there = resources.share(cluster.num_workers, cluster)
    work = f"about {needs.flops / 1e9:,.1f} GFLOP a step, {needs.flops * steps / 1e12:,.2f} TFLOP in {steps} steps"
    if resources.flops is not None:
        seconds = needs.flops * steps / cluster.num_workers / resources.flops
        work += f": at least {seconds:,.0f} s at {resources.flops / 1e9:,.0f} GFLOP/s a worker (measured)"
    layer = readable(size.largest_layer(ITEMSIZE[config.model.dtype]))
    return [
        (
            "model",
            f"{size.parameters:,} parameters, {size.experts / size.parameters:.0%} of them in experts; a layer {layer}",
        ),
        (
            "a worker",
            f"weights {readable(needs.weights)}, trained state {readable(needs.state)}, activations about "
            f"{readable(needs.activations)}, cache up to {readable(needs.cache)}",
        ),
        ("at hand", f"{there} for each of {cluster.num_workers}"),
        ("reads", f"{readable(needs.reads)} of the checkpoint, once, on each worker"),
        ("traffic", f"about {readable(needs.traffic)} from each worker, a step"),
        ("arithmetic", work),
        ("patch", readable(needs.patch)),
    ]
