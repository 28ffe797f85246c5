"""Loading without a second copy: the bits of `from_pretrained`, a rank's own experts only, and peak memory."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run
from safetensors.torch import save_file
from tasks import ascend, make_plan, random_batch, rows_of, train_local
from test_checkpoint import edit_config, edit_tensors, quantised
from tiny import FAMILY_NAMES, VOCAB, save_tiny, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from seuf_ray.artifacts import Expert
from seuf_ray.checkpoint.folder import Checkpoint
from seuf_ray.checkpoint.naming import place, stored_names, view
from seuf_ray.checkpoint.shards import SINGLE
from seuf_ray.config import ClusterConfig, TrainingConfig
from seuf_ray.errors import ConfigError
from seuf_ray.families import FAMILIES
from seuf_ray.model.loading import load
from seuf_ray.model.moe import MoEModel
from seuf_ray.model.overlay import Overlay

GIANT = "1GB"  # larger than any tiny model: one shard
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen2-MoE in one file, to break."""
    return save_tiny(tmp_path / "base", "qwen2_moe", max_shard_size=GIANT)


def save_with(folder: Path, family: str, **changes: Any) -> Path:
    """The tiny model of `family` with another configuration; weights as transformers initialises them."""
    config = tiny_config(family)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def assert_like_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """Every parameter and buffer, also those that are not stored, and the logits; returns the model."""
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="grouped_mm")
    found: Any = load(Checkpoint(folder), dtype)
    for kind in ("state_dict", "named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
    assert found.config.to_dict() == expected.config.to_dict()
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    return found


class TestLikeTransformers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["from32", "from16"])
    @pytest.mark.parametrize("family", FAMILY_NAMES)
    def test_every_family(self, family: str, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
        assert_like_transformers(save_tiny(tmp_path / "a", family, dtype=stored), dtype)

    @pytest.mark.parametrize("family", FAMILY_NAMES)
    def test_tied_embeddings(self, family: str, tmp_path: Path) -> None:
        folder = save_with(tmp_path / "a", family, tie_word_embeddings=True)
        assert HEAD not in Checkpoint(folder).files
        model = assert_like_transformers(folder, torch.bfloat16)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize("stored", ["head only", "both equal", "both different"])
    def test_tied_embeddings_stored_otherwise(self, tmp_path: Path, stored: str) -> None:
        folder = save_with(tmp_path / "a", "qwen3_moe", tie_word_embeddings=True)
        head = Checkpoint(folder).read(EMBED) + (stored == "both different")
        edit_tensors(folder / SINGLE, **{HEAD: head} | ({EMBED: None} if stored == "head only" else {}))
        model = assert_like_transformers(folder, torch.float32)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (stored != "both different")

    def test_rotary_frequencies_that_are_rescaled(self, tmp_path: Path) -> None:
        rope = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
        assert_like_transformers(
            save_with(tmp_path / "a", "deepseek_v3", rope_parameters=rope), torch.bfloat16
        )

    def test_the_correction_bias_keeps_its_precision(self, tmp_path: Path) -> None:
        model: Any = load(Checkpoint(save_tiny(tmp_path / "a", "deepseek_v3")), torch.bfloat16)
        bias = model.model.layers[1].mlp.gate.e_score_correction_bias
        assert bias.dtype == torch.float32
        assert torch.equal(bias, tiny_model("deepseek_v3").model.layers[1].mlp.gate.e_score_correction_bias)

    def test_float8_with_a_head_for_the_next_but_one_token(self, tmp_path: Path) -> None:
        """As DeepSeek-V3 is published: projections in float8, layer N + 1 for speculation, which is ignored."""
        source = Checkpoint(save_tiny(tmp_path / "source", "deepseek_v3"))
        eighth, sixteenth = {}, {}
        for name in source.files:
            tensor = source.read(name)
            if name.endswith("proj.weight") and "layers" in name:
                eighth[name], eighth[name + "_scale_inv"], sixteenth[name] = quantised(tensor, (16, 16))
            else:
                eighth[name] = sixteenth[name] = tensor
        extra = {
            "model.layers.3.eh_proj.weight": torch.ones(2, 2),
            "model.layers.3.embed_tokens.weight": torch.ones(2),
        }
        folders = {"eighth": eighth | extra, "sixteenth": sixteenth}
        for name, tensors in folders.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text((source.folder / "config.json").read_text())
            save_file(tensors, tmp_path / name / SINGLE, {"format": "pt"})
        edit_config(
            tmp_path / "eighth",
            quantization_config={"weight_block_size": [16, 16]},
            num_nextn_predict_layers=1,
        )
        expected = load(Checkpoint(tmp_path / "sixteenth"), torch.float32).state_dict()
        found = load(Checkpoint(tmp_path / "eighth"), torch.float32).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class TestRefused:
    @pytest.mark.parametrize(
        "name",
        ["model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.2.input_layernorm.weight", EMBED],
    )
    def test_a_missing_tensor(self, folder: Path, name: str) -> None:
        edit_tensors(folder / SINGLE, **{name: None})
        with pytest.raises(ConfigError, match=rf"base: tensor '{name}' is missing, which a qwen2_moe model"):
            load(Checkpoint(folder))

    def test_tied_embeddings_of_which_there_are_none(self, tmp_path: Path) -> None:
        folder = save_with(tmp_path / "a", "mixtral", tie_word_embeddings=True)
        edit_tensors(folder / SINGLE, **{EMBED: None})
        with pytest.raises(ConfigError, match=rf"tensor '{EMBED}' is missing"):
            load(Checkpoint(folder))

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.1.mlp.experts.8.up_proj.weight",
            "model.layers.3.input_layernorm.weight",
            "score.weight",
        ],
    )
    def test_an_unknown_tensor(self, folder: Path, name: str) -> None:
        edit_tensors(folder / SINGLE, **{name: torch.ones(16, 32)})
        with pytest.raises(ConfigError, match=rf"base: tensor '{name}' is unknown to a qwen2_moe model"):
            load(Checkpoint(folder))

    def test_another_shape(self, folder: Path) -> None:
        name = "model.layers.1.mlp.experts.5.up_proj.weight"
        edit_tensors(folder / SINGLE, **{name: torch.ones(17, 32)})
        with pytest.raises(ConfigError, match=rf"'{name}' is \(17, 32\), config.json asks for \(16, 32\)"):
            load(Checkpoint(folder))

    def test_experts_that_there_are_not(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"range\(4, 9\) reaches beyond the last of 8 experts"):
            load(Checkpoint(folder), owned=range(4, 9))

    def test_what_older_versions_stored_is_ignored(self, folder: Path) -> None:
        edit_tensors(folder / SINGLE, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
        load(Checkpoint(folder))


class TestNaming:
    @pytest.mark.parametrize("family", FAMILY_NAMES)
    def test_every_tensor_has_its_place_and_every_place_its_tensors(
        self, family: str, tmp_path: Path
    ) -> None:
        checkpoint = Checkpoint(save_tiny(tmp_path / "a", family))
        model = tiny_model(family)
        names = [name for path in model.state_dict() for name in stored_names(checkpoint.family, path, 8)]
        assert sorted(names) == sorted(checkpoint.files)
        for path, tensor in model.state_dict().items():
            for name in stored_names(checkpoint.family, path, 8):
                at = place(checkpoint.family, name)
                assert at.path == path
                assert torch.equal(at.of(tensor), checkpoint.read(name))

    @pytest.mark.parametrize(
        "name",
        [
            "model.nope",
            "model.layers.1.mlp.experts.8.up_proj.weight",
            "model.layers.0.mlp.experts.1.x.weight",
        ],
    )
    def test_what_the_model_does_not_have(self, name: str) -> None:
        with pytest.raises(KeyError, match=name):
            view(tiny_model("qwen2_moe"), FAMILIES["qwen2_moe"], name)


class TestOwned:
    @pytest.mark.parametrize("family", FAMILY_NAMES)
    def test_only_these_experts_are_read(self, family: str, tmp_path: Path) -> None:
        checkpoint, calls = Checkpoint(save_tiny(tmp_path / "a", family)), []
        whole = MoEModel(checkpoint)
        part = MoEModel(checkpoint, owned=range(2, 5))
        load(checkpoint, owned=range(2, 5), progress=lambda *call: calls.append(call))
        held = part.tensor_names()
        others = set(whole.tensor_names()) - set(held)
        assert {checkpoint.family.parse_expert(name)[1] for name in others} == {0, 1, 5, 6, 7}
        for name in whole.tensor_names():
            assert torch.equal(part.view(name), whole.view(name)), name
            part.view(name).zero_()
            assert bool(part.view(name).any()) == (name in others), name  # what is not held comes as a copy
        buffers = len(checkpoint.files) - len(whole.tensor_names())
        assert calls == [(n + 1, len(held) + buffers) for n in range(len(held) + buffers)]

    def test_an_overlay_of_experts_elsewhere_starts_from_the_checkpoint(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        plan = make_plan(checkpoint, [(1, 0), (2, 7)])
        tensors = Overlay(MoEModel(checkpoint, torch.bfloat16, owned=range(4)), plan).tensors()
        expected = Overlay(MoEModel(checkpoint, torch.bfloat16), plan).tensors()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())

    def test_a_block_that_is_replaced_after_detaching_is_freed(self, folder: Path) -> None:
        model = MoEModel(Checkpoint(folder))
        model.forward(random_batch())
        parameter = weakref.ref(model.sites[1].block.experts.down_proj)
        model.detach()
        model.module.model.layers[1].mlp = torch.nn.Identity()
        assert parameter() is None

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    @pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
    def test_two_ranks_that_read_half_of_the_experts_each_train_as_one_process(
        self, family: str, tmp_path: Path
    ) -> None:
        folder, experts = save_tiny(tmp_path / "a", family), [(1, 0), (2, 6)]
        expected = train_local(folder, experts)
        for tensors in run(train_owned, 2, str(folder), experts):
            assert tensors.keys() == expected.keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, expected[name], atol=3e-5, rtol=0)


def train_owned(folder: str, experts: list[Expert]) -> dict[str, torch.Tensor]:
    """`tasks.train_local` on one of two ranks, which reads its own four experts of each layer only."""
    from seuf_ray.engine.deepspeed_engine import DeepSpeedEngine

    torch.set_num_threads(1)
    rank, checkpoint = dist.get_rank(), Checkpoint(Path(folder))
    model = MoEModel(checkpoint, owned=range(4 * rank, 4 * rank + 4))
    cluster = ClusterConfig(num_workers=2, expert_parallel_size=2)
    engine = DeepSpeedEngine(model, make_plan(checkpoint, experts), TrainingConfig(), cluster)
    for step in range(3):
        ascend(engine, rows_of(random_batch(seed=step), list(range(rank, 5, 2))))
    return engine.tensors()


def measured_rank(small: str, large: str, num_owned: int, dtype: str) -> tuple[float, float]:
    """By how many MB loading raises peak and final resident memory of a process that does nothing else."""
    load(Checkpoint(Path(small)))  # whatever is imported late
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before, owned = status("VmRSS"), range(num_owned)
    model: Any = load(Checkpoint(Path(large)), getattr(torch, dtype), owned=owned)
    assert model.model.layers[-1].mlp.experts.down_proj[owned[-1]].any()
    return status("VmHWM") - before, status("VmRSS") - before


def status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


def save_large(folder: Path) -> Path:
    """A Qwen2-MoE of 256 MB in bfloat16, nearly all experts, one shard per layer."""
    tiny_config("qwen2_moe").save_pretrained(folder)
    wide = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 16}
    edit_config(folder, num_hidden_layers=5, layer_types=["full_attention"] * 5, **wide)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: dict[str, str] = {}
    for layer in [*range(5), None]:
        inside = f"model.layers.{layer}." if layer is not None else ""
        tensors: dict[str, torch.Tensor] = {}
        for path, tensor in model.state_dict().items():
            if path.startswith(inside) and ("layers" in path) == bool(inside):
                for name in stored_names(FAMILIES["qwen2_moe"], path, 16):
                    shape = place(FAMILIES["qwen2_moe"], name).of(tensor).shape
                    tensors[name] = torch.full(shape, 0.5, dtype=torch.bfloat16)
        save_file(tensors, folder / f"{layer}.safetensors", {"format": "pt"})
        files |= dict.fromkeys(tensors, f"{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = save_large(tmp_path_factory.mktemp("large"))
    yield folder
    shutil.rmtree(folder)  # pytest would keep it for three more runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_owned", "dtype"), [(16, "bfloat16"), (8, "bfloat16"), (8, "float32"), (1, "float32")]
)
def test_peak_memory_is_the_weights_that_are_kept(
    folder: Path, large: Path, num_owned: int, dtype: str
) -> None:
    checkpoint = Checkpoint(large)
    numel = {name: checkpoint.read(name).numel() for name in checkpoint.files}
    experts = sum(n for name, n in numel.items() if checkpoint.family.parse_expert(name))
    assert experts / sum(numel.values()) > 0.9
    size = 4 if dtype == "float32" else 2
    kept = (sum(numel.values()) - experts + experts * num_owned / 16) * size / 2**20
    ((peak, final),) = run(measured_rank, 1, str(folder), str(large), num_owned, dtype)
    print(f"{num_owned} of 16 experts, {dtype}: kept {kept:.0f} MB, peak {peak:.0f} MB, final {final:.0f} MB")
    assert 0.9 * kept < final < kept + 20
    assert peak < kept + 20
