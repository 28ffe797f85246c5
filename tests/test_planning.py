"""What a job will take, against the sizes of real models and against what passes really keep in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import headers
import pytest
import torch
from headers import header_only
from tasks import make_plan
from tiny import FAMILY_NAMES, save_tiny, tiny_plan
from torch import Tensor

from seuf_ray import embedded
from seuf_ray.artifacts import Expert, UnlearningPlan
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.checkpoint.sizes import ModelSize, readable
from seuf_ray.config import ClusterConfig, JobConfig, TrainingConfig, validate
from seuf_ray.engine import LocalEngine
from seuf_ray.errors import ConfigError
from seuf_ray.model.moe import MoEModel
from seuf_ray.passes import Batch, Targets
from seuf_ray.planning import (
    AttributionNeeds,
    Pass,
    UnlearningNeeds,
    choose_engine,
    patch_bytes,
    plan_summary,
    require_room,
    state_bytes,
)
from seuf_ray.plugins import Reads
from seuf_ray.resources import Memory, Node, Resources, require_slots

GIB, MIB = 2**30, 2**20
REAL = {
    "qwen": ("qwen2_moe", headers.QWEN),
    "lite": ("deepseek_v2", headers.DEEPSEEK_V2_LITE),
    "mixtral": ("mixtral", headers.MIXTRAL),
    "v3": ("deepseek_v3", headers.DEEPSEEK_V3),
}


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The four models of the table, without their weights."""
    folder = tmp_path_factory.mktemp("headers")
    return {name: Checkpoint(header_only(folder / name, *what)) for name, what in REAL.items()}


def job(name: str = "tiny", **sections: Any) -> JobConfig:
    model = {"name": name, "dtype": "bfloat16", **sections.pop("model", {})}
    return validate({"output_dir": "unused", "model": model, **sections})


def targets_of(checkpoint: Checkpoint, plan: UnlearningPlan) -> Targets:
    moe = checkpoint.shape.moe_layers
    return Targets(tuple(plan.experts), tuple(plan.routers) or moe, moe, checkpoint.shape.scoring)


def needs_of(config: JobConfig, checkpoint: Checkpoint, *experts: Expert) -> UnlearningNeeds:
    plan = tiny_plan(checkpoint, *experts)
    return UnlearningNeeds.of(config, checkpoint, plan, targets_of(checkpoint, plan))


# -- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "one", "per_layer", "adam_mib", "adam_gib", "patch_mib", "patch_gib", "layer_gib"),
    [
        ("qwen", 14.316, 0.0613, 1.47, 100, 2.4, 16.7, 0.39, 0.97),
        ("lite", 15.706, 0.0559, 1.45, 100, 2.6, 16.8, 0.43, 1.03),
        ("mixtral", 46.7, 0.377, 12.1, 2016, 63.0, 336, 10.5, 2.62),
        ("v3", 671.0, 0.0068, 0.40, 525, 29.7, 87.5, 4.96, 21.0),
    ],
)
def test_the_papers_models(
    real: dict[str, Checkpoint], name: str, billions: float, one: float, per_layer: float, adam_mib: float,
    adam_gib: float, patch_mib: float, patch_gib: float, layer_gib: float,
) -> None:  # fmt: skip
    """One expert and its router, by hand for Qwen1.5-MoE: 3 * 2048 * 1408 + 60 * 2048 = 8,773,632 of 14,315,784,192
    parameters = 0.0613 %; 12 bytes of Adam each = 100.4 MiB, 2 bytes of bfloat16 patch = 16.7 MiB."""
    checkpoint = real[name]
    size, layers = ModelSize.of(checkpoint), checkpoint.shape.moe_layers
    alone, all_layers = (
        tiny_plan(checkpoint, (layers[0], 5)),
        tiny_plan(checkpoint, *((at, 5) for at in layers)),
    )
    cluster = ClusterConfig()
    assert size.parameters == checkpoint.num_parameters == pytest.approx(billions * 1e9, rel=1e-3)
    assert 100 * alone.num_trainable / size.parameters == pytest.approx(one, rel=6e-3)
    assert 100 * all_layers.num_trainable / size.parameters == pytest.approx(per_layer, rel=1e-2)
    # The table leaves the gradient out: 12 of our 16 bytes.
    assert state_bytes(alone, cluster, 2) * 12 / 16 == pytest.approx(adam_mib * MIB, rel=5e-3)
    assert state_bytes(all_layers, cluster, 2) * 12 / 16 == pytest.approx(adam_gib * GIB, rel=3e-2)
    assert patch_bytes(checkpoint, alone) == pytest.approx(patch_mib * MIB, rel=5e-3)
    assert patch_bytes(checkpoint, all_layers) == pytest.approx(patch_gib * GIB, rel=2e-2)
    assert size.layers[-1].experts * 2 == pytest.approx(layer_gib * GIB, rel=5e-3)


def test_the_embedded_models_sizes_are_those_of_the_model_in_memory() -> None:
    checkpoint = Checkpoint(embedded.checkpoint("specialised"))
    size, module = ModelSize.of(checkpoint), MoEModel(checkpoint).module
    numel = sum(parameter.numel() for parameter in module.parameters())  # tied weights once
    experts = sum(p.numel() for name, p in module.named_parameters() if ".mlp.experts." in name)
    assert (size.parameters, size.experts) == (numel, experts)
    assert size.weights(4) == 4 * numel
    assert size.weights(4, 2) == 4 * (numel - experts // 2)
    shards = sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))
    assert size.stored() == pytest.approx(shards, rel=0.01)  # but for the header
    assert size.stored() - size.stored(2) == size.stored_experts // 2


def test_heads_for_several_next_tokens_are_not_loaded_and_do_not_count(tmp_path: Path) -> None:
    """DeepSeek-V3's checkpoint has a 62nd layer that transformers does not build."""
    sizes = headers.DEEPSEEK_V3 | {"num_hidden_layers": 4, "n_routed_experts": 8}
    longer = header_only(tmp_path / "longer", "deepseek_v3", sizes | {"num_hidden_layers": 5})
    shorter = header_only(tmp_path / "shorter", "deepseek_v3", sizes)
    expected = ModelSize.of(Checkpoint(shorter))
    (longer / "config.json").write_text((shorter / "config.json").read_text())
    found = ModelSize.of(Checkpoint(longer))
    assert (found.parameters, found.stored()) == (expected.parameters, expected.stored())


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (17.5 * GIB, "17.5 GiB")]
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert readable(size) == text


# -- what training takes -----------------------------------------------------------------------------------------


def test_a_deepseek_v3_job_on_sixteen_workers(real: dict[str, Checkpoint]) -> None:
    """Layer 10 expert 5 on 16 ranks, experts over 16, NPO-like passes of 32 rows of 256 tokens, by hand:

    weights      (671.026 B - 653.908 B + 653.908 B / 16) * 2 bytes                       = 108.0 GiB
    state        45,875,200 trained parameters * 16 bytes                                 = 700 MiB
    gradients    2 * 15 / 16 * 4 bytes * 45,875,200                                       = 328 MiB
    exchange     512 tokens a rank * 8 experts * 7168 * 2 bytes * 15/16 * 51 layers * 4   = 10.5 GiB
    """
    config = job(
        data={"sequence_length": 256},
        cluster={"num_workers": 16, "expert_parallel_size": 16},
        algorithm={"name": "ga"},
        anchor={"name": "none"},
    )
    needs = needs_of(config, real["v3"], (10, 5))
    assert needs.weights == pytest.approx(108.0 * GIB, rel=1e-3)
    assert needs.state == 45_875_200 * 16 == 700 * MIB
    exchange = 512 * 8 * 7168 * 2 * 15 // 16 * 51 * 4
    assert needs.traffic == 45_875_200 * 4 * 2 * 15 // 16 + exchange
    assert needs.reads == needs.weights  # stored in bfloat16, too
    assert needs.patch == 87.5 * MIB


@pytest.mark.parametrize(
    ("stage", "per_parameter"),
    [(0, 16), (1, 4 + 4 + 12 / 4), (2, 4 + 16 / 4), (3, 20 / 4)],
)
def test_zero_divides_the_state_over_four_workers(
    real: dict[str, Checkpoint], stage: int, per_parameter: float
) -> None:
    """Stage 1 divides moments and masters (8 + 4 bytes), 2 gradients (4), 3 the values (4)."""
    cluster = ClusterConfig.model_validate({"num_workers": 4, "expert_parallel_size": 4, "zero_stage": stage})
    plan = tiny_plan(real["lite"], (4, 5))
    assert state_bytes(plan, cluster, 2) == plan.num_trainable * per_parameter


def test_lower_layers_are_free_and_shallow_losses_cheap(real: dict[str, Checkpoint]) -> None:
    """One expert in layer 20 keeps and computes 7 of 27 layers; a loss that reads layer 21's input, 1; GA twice that of
    a pass it does not share; everything, three products of all layers instead of two."""
    checkpoint, config = real["lite"], job(algorithm={"name": "ga"}, anchor={"name": "none"})
    low, high = needs_of(config, checkpoint, (1, 5)), needs_of(config, checkpoint, (20, 5))
    head = 4.0 * 32 * 256 * 102400 * 2048  # 2 operations, forward and backward
    assert (high.flops - head) / (low.flops - head) == pytest.approx(7 / 26, rel=1e-6)
    both = needs_of(job(algorithm={"name": "gdiff"}, anchor={"name": "none"}), checkpoint, (20, 5))
    assert both.flops == 2 * high.flops
    full = needs_of(config, checkpoint)
    assert full.flops > 1.5 * low.flops and full.cache == 0
    assert full.state == 4 * 2 * checkpoint.num_parameters


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    """Matrix products of one forward pass, by torch's own counter; attention's are not in the estimate, and are few."""
    from torch.utils.flop_counter import FlopCounterMode

    checkpoint = Checkpoint(embedded.checkpoint("specialised"))
    model, batch = MoEModel(checkpoint), _full_batch(8, 32)
    model.module.set_experts_implementation("eager")  # grouped_mm is not counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.forward(batch)
    config = job(
        data={"sequence_length": 32},
        training={"batch_size": 8},
        algorithm={"name": "ga"},
        anchor={"name": "none"},
    )
    forward = needs_of(config, checkpoint, (0, 5)).flops / 2
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("is_full", [False, True], ids=["expert", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*FAMILY_NAMES, "embedded"])
def test_activations_are_what_autograd_keeps_within_a_factor_of_two(
    tmp_path: Path, name: str, dtype: str, is_full: bool
) -> None:
    """Of the layers alone: the head's largest tensors exist in the backward pass only."""
    folder = embedded.checkpoint("specialised") if name == "embedded" else save_tiny(tmp_path / "model", name)
    checkpoint = Checkpoint(folder)
    plan = make_plan(checkpoint, [] if is_full else [(checkpoint.shape.moe_layers[0], 0)])
    engine = LocalEngine(MoEModel(checkpoint, getattr(torch, dtype)), plan, TrainingConfig())
    layers_only = Reads(depth=checkpoint.shape.num_layers)
    kept = _kept(
        lambda: engine.forward(_full_batch(8, 60), grad=True, reads=layers_only), engine.model.module
    )
    config = job(model={"dtype": dtype}, data={"sequence_length": 60}, training={"batch_size": 8})
    estimate = Pass(config, ModelSize.of(checkpoint), plan, layers_only).activations
    assert 0.5 < estimate / kept < 2


def _full_batch(rows: int, length: int) -> Batch:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))


def _kept(run: Callable[[], object], module: torch.nn.Module) -> int:
    """Bytes of the storages that the graph of `run` holds, without the model's own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}  # tensors, so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = run()
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)


def test_checkpointing_keeps_each_layers_input_and_one_layer(real: dict[str, Checkpoint]) -> None:
    """V2-Lite from layer 20 on, 32 rows of 256 tokens in bfloat16: 7 inputs of 2048 numbers, 1.5 times what one layer
    gives out (16 * 192 queries, 576 compressed, 16 * 256 keys and values, 2048 output, 64 router, 2 * 2816 + 2048
    shared, 6 * (2 * 1408 + 2048) routed), and 256 tokens' logits."""
    outputs = 16 * 192 + 576 + 16 * 256 + 2048 + 64 + 2 * 2816 + 2048 + 6 * (2 * 1408 + 2048)
    config = job(engine={"gradient_checkpointing": True})
    found = Pass(config, ModelSize.of(real["lite"]), tiny_plan(real["lite"], (20, 5)), Reads())
    assert found.activations == 32 * 256 * 2 * (7 * 2048 + 1.5 * outputs) + 256 * 102400 * 12
    in_parts = job(engine={"gradient_checkpointing": True, "micro_batch_size": 8})
    parts = Pass(in_parts, ModelSize.of(real["lite"]), tiny_plan(real["lite"], (20, 5)), Reads())
    assert parts.activations == 8 * 256 * 2 * (7 * 2048 + 1.5 * outputs) + 256 * 102400 * 12


# -- what there is, and what fits --------------------------------------------------------------------------------


def test_processes_share_the_smallest_node_that_takes_them() -> None:
    """Four workers of 2 CPUs: the 4-CPU node takes two of them at 8 GiB each, the 16-CPU node four at 10; a head with
    one CPU takes none, and does not count."""
    nodes = (Node(1, 1 * GIB), Node(4, 16 * GIB), Node(16, 40 * GIB))
    cluster = ClusterConfig(cpus_per_worker=2)
    assert Resources(nodes).share(4, cluster) == Memory(8 * GIB)
    assert Resources(nodes).share(1, cluster) == Memory(16 * GIB)
    assert Resources(nodes[2:]).share(100, cluster) == Memory(5 * GIB)


def test_workers_with_gpus_are_placed_where_gpus_are() -> None:
    nodes = (Node(64, 500 * GIB), Node(32, 256 * GIB, num_gpus=8, gpu_bytes=80 * GIB))
    resources = Resources(nodes)
    assert resources.share(16, ClusterConfig(gpus_per_worker=1)) == Memory(32 * GIB, 80 * GIB)
    assert resources.share(16, ClusterConfig(gpus_per_worker=0.5)) == Memory(16 * GIB, 40 * GIB)
    with pytest.raises(ConfigError, match="no node has 1 CPU and 9 GPU for one worker"):
        resources.share(1, ClusterConfig(gpus_per_worker=9))


def test_a_group_that_no_nodes_take_is_refused() -> None:
    """Two nodes of 2 CPUs take no worker of 3; two of 3 CPUs have room for two workers of 2, and not for three."""
    pairs, triples = [Node(2, 0)] * 2, [Node(3, 0)] * 2
    with pytest.raises(ConfigError, match=r"num_workers = 1 of 3 CPU each .*\(2 of 2 CPU\) have room for 0"):
        require_slots(pairs, ClusterConfig(cpus_per_worker=3))
    with pytest.raises(ConfigError, match=r"num_workers = 3 of 2 CPU each .*\(2 of 3 CPU\) have room for 2"):
        require_slots(triples, ClusterConfig(num_workers=3, cpus_per_worker=2))
    with pytest.raises(ConfigError, match=r"of 1 CPU and 2 GPU each .*1 of 8 CPU, 1 of 4 CPU and 1 GPU"):
        require_slots([Node(8, 0), Node(4, 0, 1)], ClusterConfig(gpus_per_worker=2))
    assert require_slots(triples, ClusterConfig(num_workers=2, cpus_per_worker=1.5)) == 4
    assert require_slots([Node(1, 0)], ClusterConfig(num_workers=10, cpus_per_worker=0.1)) == 10


@pytest.mark.parametrize(
    ("node", "workers", "engine", "reason"),
    [
        (Node(8, 64 * GIB), 1, "actors", "an actor needs 30.. GiB for the whole model and has 64.0 GiB"),
        (
            Node(1, 20 * GIB),
            8,
            "expert_parallel",
            "whole model and has 20.0 GiB; a worker with 1/8 of the experts",
        ),
        (
            Node(1, 4 * GIB),
            8,
            "streamed",
            "one of 8 workers would need .* and has 4.0 GiB; one layer at a time needs",
        ),
        (
            Node(1, 20 * GIB),
            1,
            "streamed",
            "expert_parallel_size = 1 divides no experts; one layer at a time",
        ),
        (
            Node(8, 200 * GIB, 1, 80 * GIB),
            1,
            "actors",
            "needs 1.. GiB and 29.. GiB on the GPU .* has 200.0 GiB and 80",
        ),
        (
            Node(8, 200 * GIB, 1, 24 * GIB),
            8,
            "expert_parallel",
            "needs .* on the GPU and has 200.0 GiB and 24.0 GiB",
        ),
    ],
    ids=["fits", "shared", "too-large-for-a-share", "alone", "gpu", "gpu-shared"],
)
def test_the_engine_is_the_fastest_that_fits(
    real: dict[str, Checkpoint], node: Node, workers: int, engine: str, reason: str
) -> None:
    """DeepSeek-V2-Lite takes 29.3 GiB in bfloat16: 5.8 GiB a rank with an eighth of its experts."""
    cluster = {"num_workers": workers, "expert_parallel_size": workers, "gpus_per_worker": int(node.num_gpus)}
    config = job(cluster=cluster)
    needs = AttributionNeeds.of(config, ModelSize.of(real["lite"]))
    found, why = choose_engine(needs, Resources((node,)), config)
    assert found == engine
    assert re.search(reason, why), why


def test_several_actors_share_a_node(real: dict[str, Checkpoint]) -> None:
    needs = AttributionNeeds.of(job(), ModelSize.of(real["lite"]))
    there = Resources((Node(8, 64 * GIB),))
    assert choose_engine(needs, there, job(attribution={"num_actors": 2}))[0] == "actors"
    assert choose_engine(needs, there, job(attribution={"num_actors": 3}))[0] == "streamed"


def test_weights_that_cannot_fit_are_refused_with_what_to_change(real: dict[str, Checkpoint]) -> None:
    """Two workers of V2-Lite in float32 with half of the experts each: 31.7 GiB, on a node of 48 GiB."""
    cluster = {"num_workers": 2, "expert_parallel_size": 2}
    config = job("big/model", model={"dtype": "float32"}, cluster=cluster)
    needs, size = needs_of(config, real["lite"], (4, 5)), ModelSize.of(real["lite"])
    with pytest.raises(
        ConfigError,
        match="big/model.*cluster.num_workers = 2 .* 31.7 GiB .* in float32, its node .* 24.0 GiB",
    ):
        require_room(needs, Resources((Node(2, 48 * GIB),)), config, size)
    with pytest.raises(
        ConfigError, match="experts are 92% .*cluster.expert_parallel_size .now 2.*model.dtype = 'bfloat16'"
    ):
        require_room(needs, Resources((Node(2, 48 * GIB),)), config, size)
    just = 2 * int(needs.weights / 1.1)  # what is at hand is an estimate: only a clear excess is refused
    require_room(needs, Resources((Node(2, just + 2**20),)), config, size)
    with pytest.raises(ConfigError):
        require_room(needs, Resources((Node(2, just - 2**20),)), config, size)


def test_a_gpu_too_small_is_refused_and_a_host_where_experts_are_sorted(real: dict[str, Checkpoint]) -> None:
    size = ModelSize.of(real["lite"])
    one = job(cluster={"gpus_per_worker": 1})
    with pytest.raises(ConfigError, match="its GPU gives it 24.0 GiB"):
        require_room(
            needs_of(one, real["lite"], (4, 5)), Resources((Node(8, 8 * GIB, 1, 24 * GIB),)), one, size
        )
    require_room(needs_of(one, real["lite"], (4, 5)), Resources((Node(8, 8 * GIB, 1, 40 * GIB),)), one, size)
    two = job(cluster={"gpus_per_worker": 1, "num_workers": 2, "expert_parallel_size": 2})
    with pytest.raises(ConfigError, match="its node gives it 8.0 GiB"):
        require_room(
            needs_of(two, real["lite"], (4, 5)), Resources((Node(8, 16 * GIB, 2, 40 * GIB),)), two, size
        )


def test_the_summary_tells_every_figure(real: dict[str, Checkpoint]) -> None:
    config = job(cluster={"num_workers": 8, "expert_parallel_size": 8}, training={"steps": 100})
    needs, size = needs_of(config, real["lite"], (4, 5)), ModelSize.of(real["lite"])
    lines = dict(plan_summary(config, size, needs, Resources((Node(1, 20 * GIB),), flops=1e12)))
    assert list(lines) == ["model", "a worker", "at hand", "reads", "traffic", "arithmetic", "patch"]
    assert lines["model"].startswith("15,706,484,224 parameters, 92% of them in experts; a layer 1.1 GiB")
    assert lines["patch"] == "16.8 MiB" and lines["at hand"] == "20.0 GiB for each of 8"
    seconds = needs.flops * 100 / 8 / 1e12
    assert f"at least {seconds:,.0f} s at 1,000 GFLOP/s a worker (measured)" in lines["arithmetic"]
    assert (
        "measured"
        not in dict(plan_summary(config, size, needs, Resources((Node(1, 20 * GIB),))))["arithmetic"]
    )


# -- on Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("ray_session")
def test_a_job_on_ray_is_foreseen_and_one_that_cannot_be_placed_refused(tmp_path: Path) -> None:
    """The session has 4 CPUs; the embedded model's weights in float32 are known to the byte."""
    from seuf_ray.job import Job
    from seuf_ray.stages.resources import at_hand, fitting_engine, foresee

    config = validate({"output_dir": str(tmp_path / "out"), "cluster": {"num_workers": 4}})
    there = at_hand(config)
    assert [node.num_cpus for node in there.nodes] == [4]
    assert GIB < there.nodes[0].host_bytes < 2**44
    one = Job(config)
    plan = tiny_plan(one.checkpoint, (1, 5))
    lines = dict(foresee(one, plan))
    assert f"weights {readable(4 * one.checkpoint.num_parameters)}" in lines["a worker"]
    assert re.search(r"at least \d+ s at [1-9]\d* GFLOP/s", lines["arithmetic"])
    assert fitting_engine(one)[0] == "actors"
    greedy = Job(validate({"output_dir": str(tmp_path / "out"), "cluster": {"cpus_per_worker": 5}}))
    with pytest.raises(ConfigError, match="no node has 5 CPU"):
        foresee(greedy, plan)
