"""Streaming one layer at a time: the in-memory engine's bits, of one layer's memory, reading what routers need."""

from __future__ import annotations

import functools
import math
import operator
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run
from test_checkpoint import edit_tensors
from test_loading import EMBED, HEAD, save_large, save_with, status
from tiny import FAMILY_NAMES, VOCAB, save_tiny
from torch import Tensor, nn

from seuf_ray.attribution.bootstrap import Bootstrap, Sequences
from seuf_ray.attribution.statistics import RoutingStatistics, unit_statistics
from seuf_ray.attribution.streaming import HiddenStates, stream
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.checkpoint.shards import SINGLE
from seuf_ray.errors import ConfigError
from seuf_ray.model.loading import Weights
from seuf_ray.model.moe import MoEModel
from seuf_ray.passes import Batch

Unit = tuple[Batch, Sequences]
BOOTSTRAP = Bootstrap(seed=7, replicates=4)
PACKED = [[[5, 4], [10]], [[3, 3, 3]], [[7], [2, 6], [8]]]  # units of rows of lengths of sequences


def streamed(weights: Weights, units: Iterable[Unit], hidden: HiddenStates, **more: Any) -> RoutingStatistics:
    """The statistics of one set."""
    found = stream(weights, (("forget", *unit) for unit in units), hidden, **more)
    assert list(found) == ["forget"]
    return found["forget"]


def packed_unit(lengths: Sequence[Sequence[int]], first: int) -> Unit:
    """Rows of up to 10 tokens, each of several sequences; sequences count from `first`."""
    ids = torch.randint(3, VOCAB, (len(lengths), 10), generator=torch.Generator().manual_seed(first))
    rows = [
        [number for number, length in enumerate(row) for _ in range(length)] + [-1] * (10 - sum(row))
        for row in lengths
    ]
    segments = torch.tensor(rows)
    flat = [length for row in lengths for length in row]
    indices = range(first, first + len(flat))
    return Batch(ids, segments >= 0, segments >= 0, segments), BOOTSTRAP.sequences(flat, indices)


def packed_units() -> list[Unit]:
    return [packed_unit(lengths, 10 * number) for number, lengths in enumerate(PACKED)]


def padded_units() -> list[Unit]:
    """Two rows of one sequence each, as they are without packing."""
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    attention = torch.arange(9) < torch.tensor([[9], [4]])
    return [(Batch(ids, attention, attention), BOOTSTRAP.sequences([9, 4], [0, 1]))]


def in_memory(checkpoint: Checkpoint, dtype: torch.dtype, units: list[Unit]) -> RoutingStatistics:
    """What the engine that holds the whole model finds."""
    model = MoEModel(checkpoint, dtype)
    with torch.no_grad():
        parts = [unit_statistics(*model.route(batch), sequences, model.shape) for batch, sequences in units]
    return functools.reduce(operator.add, parts)


def test_two_sets_share_one_read_of_the_checkpoint(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3_moe")
    first, *others = packed_units()
    alone, both = (Weights(Checkpoint(folder), torch.float32) for _ in range(2))
    hidden = HiddenStates(2**20, tmp_path / "spill")
    mixed = [("retain", *others[0]), ("forget", *first), ("retain", *others[1])]
    found = stream(both, mixed, hidden)
    expected = [streamed(alone, units, HiddenStates(2**20, tmp_path / "x")) for units in ([first], others)]
    assert [found[name].digest() for name in ("forget", "retain")] == [one.digest() for one in expected]
    assert 2 * both.bytes_read == alone.bytes_read


@pytest.mark.parametrize("make", [packed_units, padded_units])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_bits_of_the_whole_model(
    family: str, dtype: torch.dtype, make: Callable[[], list[Unit]], tmp_path: Path
) -> None:
    checkpoint, units = Checkpoint(save_tiny(tmp_path / "model", family, dtype=dtype)), make()
    found = streamed(Weights(checkpoint, dtype), units, HiddenStates(2**20, tmp_path / "spill"))
    assert found.num_sequences == sum(len(sequences.lengths) for _, sequences in units)
    assert found.digest() == in_memory(checkpoint, dtype, units).digest()
    assert not (tmp_path / "spill").exists()


@pytest.mark.parametrize("stored", ["embeddings", "head"])
def test_tied_embeddings_whichever_of_them_is_stored(stored: str, tmp_path: Path) -> None:
    folder, units = save_with(tmp_path / "model", "mixtral", tie_word_embeddings=True), packed_units()
    if stored == "head":
        edit_tensors(folder / SINGLE, **{HEAD: Checkpoint(folder).read(EMBED), EMBED: None})
    checkpoint = Checkpoint(folder)
    found = streamed(Weights(checkpoint, torch.float32), units, HiddenStates(2**20, tmp_path / "spill"))
    assert found.digest() == in_memory(checkpoint, torch.float32, units).digest()


@pytest.mark.parametrize(
    ("max_bytes", "spilled"), [(10**6, []), (3840, [2]), (3839, [1, 2]), (2559, [0, 2]), (0, [0, 1, 2])]
)
def test_what_memory_does_not_hold_is_in_files_and_no_bit_changes(
    max_bytes: int, spilled: list[int], tmp_path: Path
) -> None:
    """Units of 2, 1 and 3 rows of 10 tokens of 32 float32: 2,560, 1,280 and 3,840 bytes. First come, first kept."""
    checkpoint, units = Checkpoint(save_tiny(tmp_path / "model", "deepseek_v3")), packed_units()
    hidden = HiddenStates(max_bytes, tmp_path / "spill")
    found = streamed(Weights(checkpoint, torch.float32), iter(units), hidden)
    assert found.digest() == in_memory(checkpoint, torch.float32, units).digest()
    assert sorted(int(path.stem) for path in (tmp_path / "spill").glob("*")) == spilled
    assert hidden.used == sum([2560, 1280, 3840][unit] for unit in range(3) if unit not in spilled)


class Watched(Checkpoint):
    """A checkpoint that remembers what was read of it, and what `look` saw meanwhile."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.names: list[str] = []

    def read_into(self, name: str, target: Tensor) -> None:
        self.names.append(name)
        super().read_into(name, target)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_a_router_needs_is_read_once_and_nothing_else(family: str, tmp_path: Path) -> None:
    """Of three layers the last one's routed experts come after its router; so do final norm and head."""
    checkpoint = Watched(save_tiny(tmp_path / "model", family))
    weights, place = Weights(checkpoint, torch.float32), checkpoint.family.parse_expert
    streamed(weights, packed_units(), HiddenStates(2**20, tmp_path / "spill"))
    unneeded = {name for name in checkpoint.files if (place(name) or [0])[0] == 2}
    assert len(unneeded) == 8 * 3
    unneeded |= {HEAD, "model.norm.weight"}
    assert sorted(checkpoint.names) == sorted(checkpoint.files.keys() - unneeded)
    assert weights.bytes_read == sum(4 * math.prod(checkpoint.info(name)[1]) for name in checkpoint.names)


def test_layers_above_the_last_router_are_not_read(tmp_path: Path) -> None:
    folder = save_with(tmp_path / "model", "qwen3_moe", mlp_only_layers=[1, 2])
    checkpoint, units, calls = Watched(folder), packed_units(), []
    hidden = HiddenStates(2**20, tmp_path / "spill")
    found = streamed(
        Weights(checkpoint, torch.float32), units, hidden, progress=lambda *call: calls.append(call)
    )
    assert not [name for name in checkpoint.names if name.startswith(("model.layers.1.", "model.layers.2."))]
    assert [call[:2] for call in calls] == [(1, 1)]
    assert found.digest() == in_memory(checkpoint, torch.float32, units).digest()


def held(module: nn.Module) -> set[str]:
    """Where weights are: the first three parts of the paths of those that have memory."""
    return {".".join(path.split(".")[:3]) for path, tensor in module.state_dict().items() if tensor.numel()}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_weights_of_one_layer_are_there_at_a_time(family: str, tmp_path: Path) -> None:
    weights = Weights(Checkpoint(save_tiny(tmp_path / "model", family)), torch.float32)
    seen: list[set[str]] = []
    for module in (weights.module.model.embed_tokens, *weights.module.model.layers):
        module.register_forward_pre_hook(lambda *_: seen.append(held(weights.module)))
    streamed(weights, packed_units(), HiddenStates(2**20, tmp_path / "spill"))
    layers = [{f"model.layers.{layer}"} for layer in range(3) for _ in PACKED]
    assert seen == [*[{"model.embed_tokens.weight"}] * len(PACKED), *layers]
    assert held(weights.module) == set()


class TestRefused:
    """Whatever is wrong with a checkpoint is found before anything is computed, and the file is named."""

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "base", "olmoe", max_shard_size="1GB")
        edit_tensors(folder / SINGLE, **{"model.layers.2.mlp.experts.7.up_proj.weight": None})
        with pytest.raises(ConfigError, match=r"base: tensor '.*2.mlp.experts.7.up_proj.weight' is missing"):
            Weights(Checkpoint(folder), torch.float32)

    def test_another_shape(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "base", "olmoe", max_shard_size="1GB")
        edit_tensors(folder / SINGLE, **{"model.layers.2.mlp.gate.weight": torch.ones(7, 32)})
        checkpoint = Watched(folder)
        with pytest.raises(ConfigError, match=r"'.*2.mlp.gate.weight' is \(7, 32\), config.json asks for"):
            Weights(checkpoint, torch.float32)
        assert checkpoint.names == []

    def test_a_truncated_shard(self, tmp_path: Path) -> None:
        shard = sorted(save_tiny(tmp_path / "base", "olmoe").glob("*.safetensors"))[-1]
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(ConfigError, match=rf"{shard.name}: truncated"):
            Checkpoint(shard.parent)

    def test_a_shard_that_is_lost_on_the_way(self, tmp_path: Path) -> None:
        """... is named too, and nothing stays in memory."""
        checkpoint = Checkpoint(save_tiny(tmp_path / "base", "olmoe"))
        weights, hidden = Weights(checkpoint, torch.float32), HiddenStates(2**20, tmp_path / "spill")
        shard = checkpoint.folder / checkpoint.files["model.layers.1.mlp.experts.0.up_proj.weight"]
        with pytest.raises(ConfigError, match=rf"{shard.name}: not readable"):
            streamed(weights, packed_units(), hidden, progress=lambda *_: shard.unlink())
        assert held(weights.module) == set()

    def test_hidden_states_without_room(self, tmp_path: Path) -> None:
        (tmp_path / "spill").write_text("a file where a folder should be")
        weights = Weights(Checkpoint(save_tiny(tmp_path / "base", "olmoe")), torch.float32)
        with pytest.raises(
            ConfigError, match=r"0\.pt: hidden states beyond attribution.hidden_bytes = 9 cannot"
        ):
            streamed(weights, packed_units(), HiddenStates(9, tmp_path / "spill"))
        assert held(weights.module) == set()


def measured_rank(small: str, large: str) -> tuple[float, float]:
    """By how many MB streaming raises peak and final resident memory of a process that does nothing else."""

    def run_through(folder: Path) -> None:
        units = [("forget", *unit) for unit in packed_units()]
        stream(Weights(Checkpoint(folder), torch.bfloat16), units, HiddenStates(0, folder / "spill"))

    run_through(Path(small))  # whatever is imported late
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before = status("VmRSS")
    run_through(Path(large))
    return status("VmHWM") - before, status("VmRSS") - before


@pytest.mark.slow
def test_resident_memory_is_one_layers(tmp_path: Path) -> None:
    """Five layers of 16 experts of 3 x 512 x 1024 in bfloat16, 48 MiB each: the peak is one of them, the end none."""
    small, large = save_tiny(tmp_path / "small", "qwen2_moe"), save_large(tmp_path / "large")
    ((peak, final),) = run(measured_rank, 1, str(small), str(large))
    shutil.rmtree(large)  # pytest would keep it for three more runs
    print(f"peak {peak:.0f} MB, final {final:.0f} MB")
    assert 48 < peak < 48 + 30
    assert final < 30
