"""How large a checkpoint is and where its parameters lie, from config.json and the headers of its shards alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.families import Shape

ITEMSIZE = {"float32": 4, "bfloat16": 2}  # of `model.dtype`


@dataclass
class LayerSize:
    """One decoder layer.

    Attributes:
        shared, experts: parameters of the routed experts, and all others.
        active: parameters that a token meets: all of `shared`, K of the E experts.
        outputs: numbers that the matrices a token meets give out for it.
    """

    shared: int = 0
    experts: int = 0
    active: float = 0.0
    outputs: float = 0.0

    @property
    def parameters(self) -> int:
        return self.shared + self.experts


@dataclass
class ModelSize:
    """The sizes that a plan is made from; heads for several next tokens are not loaded and do not count.

    Attributes:
        shape: sizes of the routing.
        width, vocabulary: D and V.
        layers: of the decoder.
        outside: parameters of embedding, final norm and head.
        stored_shared, stored_experts: bytes in the shards, of the routed experts and of everything else.
    """

    shape: Shape
    width: int
    vocabulary: int
    layers: list[LayerSize] = field(default_factory=list)
    outside: int = 0
    stored_shared: int = 0
    stored_experts: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelSize:
        """Reads nothing but the headers that `checkpoint` holds already."""
        vocabulary, width = checkpoint.info("model.embed_tokens.weight")[1]
        size = cls(
            checkpoint.shape, width, vocabulary, [LayerSize() for _ in range(checkpoint.shape.num_layers)]
        )
        for name, entry in checkpoint.entries.items():
            layer = layer_of(name)
            if layer is None or layer < checkpoint.shape.num_layers:
                is_expert = checkpoint.family.parse_expert(name) is not None
                size._count(layer, entry.shape, entry.torch_dtype.itemsize, is_expert)
        return size

    def _count(self, at: int | None, shape: tuple[int, ...], itemsize: int, is_expert: bool) -> None:
        numel = math.prod(shape)
        self.stored_experts += numel * itemsize * is_expert
        self.stored_shared += numel * itemsize * (not is_expert)
        if at is None:
            self.outside += numel
            return
        layer, met = self.layers[at], self.shape.top_k / self.shape.num_experts if is_expert else 1.0
        layer.experts += numel * is_expert
        layer.shared += numel * (not is_expert)
        layer.active += met * numel
        layer.outputs += met * shape[0] * (len(shape) == 2)

    @property
    def experts(self) -> int:
        """Parameters of all routed experts."""
        return sum(layer.experts for layer in self.layers)

    @property
    def parameters(self) -> int:
        return self.outside + sum(layer.parameters for layer in self.layers)

    def weights(self, itemsize: int, expert_parallel_size: int = 1) -> int:
        """Bytes of the weights that one rank keeps."""
        return (self.parameters - self.experts + self.experts // expert_parallel_size) * itemsize

    def largest_layer(self, itemsize: int, expert_parallel_size: int = 1) -> int:
        """Bytes of the largest decoder layer on one rank."""
        return max(row.shared + row.experts // expert_parallel_size for row in self.layers) * itemsize

    def stored(self, expert_parallel_size: int = 1) -> int:
        """Bytes that one rank reads from the shards."""
        return self.stored_shared + self.stored_experts // expert_parallel_size


def layer_of(name: str) -> int | None:
    """The decoder layer of a checkpoint tensor: 4 of `model.layers.4.mlp.gate.weight`; None outside of them."""
    parts = name.split(".", 3)
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def readable(size: float) -> str:
    """`16.7 MiB` of a number of bytes."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(size, 1024)), len(units) - 1) if size >= 1 else 0
    return f"{size / 1024**power:.{1 if power else 0}f} {units[power]}"
