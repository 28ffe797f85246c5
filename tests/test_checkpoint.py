"""Checkpoints on disk: what is read without data, what identifies them, what is refused, and whole copies."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from seuf_ray.checkpoint.folder import Checkpoint, digest, resolve, rewrite
from seuf_ray.checkpoint.shards import INDEX, SINGLE, header
from seuf_ray.errors import ConfigError, MismatchError
from seuf_ray.families import shape_of

ROUTER = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Qwen2-MoE folder that tests only read."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "base", "qwen2_moe")


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(shared, tmp_path / "base"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Save a shard again with tensors exchanged (`None`: left out)."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"}
    )


class TestResolve:
    def test_local_folder(self, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(shared.parent)
        assert resolve(str(shared)) == shared
        assert resolve("base").samefile(shared)

    def test_unknown_embedded_names_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match=r"'embedded:nope'.*specialised, unspecialised"):
            resolve("embedded:nope")

    def test_folder_without_config(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"config\.json is missing"):
            resolve(str(tmp_path))

    @pytest.mark.parametrize("name", ["./runs/model", "/no/such", "~/no-such-model", "runs/a/model", "../no"])
    def test_path_like_names_never_reach_the_hub(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub")
        )
        with pytest.raises(ConfigError, match="no such folder"):
            resolve(name)

    def test_unreachable_hub_id_is_named(self) -> None:
        with pytest.raises(
            ConfigError, match=r"'someone/nothing': no such local folder, nor a download .*'v2'"
        ):
            resolve("someone/nothing", "v2")

    def test_malformed_hub_id_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"'two words': no such local folder"):
            resolve("two words")

    def test_revision_of_a_folder_is_refused(self, shared: Path) -> None:
        with pytest.raises(ConfigError, match=r"revision 'main'.*is local"):
            resolve(str(shared), "main")

    def test_cached_snapshot_gives_its_commit(
        self, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit, repo = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--someone--tiny"
        shutil.copytree(shared, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        folder = resolve("someone/tiny")
        assert folder.samefile(repo / "snapshots" / commit)
        assert Checkpoint(folder).identity("someone/tiny").revision == commit

    def test_only_safetensors_and_texts_are_downloaded(
        self, shared: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = ["config.json", "tokenizer.json", "merges.txt", "model-00001-of-00002.safetensors", INDEX]
        others = [
            "pytorch_model.bin",
            "modeling.py",
            "x.pt",
            "original/a.safetensors",
            "consolidated.safetensors",
        ]
        taken: list[str] = []

        def download(
            name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]
        ) -> str:
            patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
            taken.extend(filter_repo_objects(wanted + others, **patterns))
            return str(shared)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert resolve("someone/tiny", "v1") == shared
        assert taken == wanted


class TestReading:
    @pytest.mark.parametrize("family", FAMILY_NAMES)
    def test_names_shapes_and_sizes_of_every_family(self, family: str, tmp_path: Path) -> None:
        checkpoint = Checkpoint(save_tiny(tmp_path / family, family))
        names = set(checkpoint.files)
        layers = checkpoint.shape.moe_layers
        assert layers == ((1, 2) if "deepseek" in family else (0, 1, 2))
        assert {checkpoint.family.router_tensor(layer) for layer in layers} <= names
        experts = {checkpoint.family.parse_expert(name) for name in names} - {None}
        assert len(experts) == len(layers) * 8 * 3
        assert len(set(checkpoint.files.values())) > 3
        model = tiny_model(family)
        extra = 16 if family == "deepseek_v3" else 0  # its correction biases are buffers
        assert checkpoint.num_parameters == sum(p.numel() for p in model.parameters()) + extra
        router = checkpoint.read(checkpoint.family.router_tensor(2))
        assert torch.equal(router, model.model.layers[2].mlp.gate.weight)

    def test_info_reads_headers_and_read_reads_values(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint(save_tiny(tmp_path / "a", "qwen3_moe", dtype=torch.bfloat16))
        assert checkpoint.info(EXPERT) == ("BF16", (32, 16))
        value = checkpoint.read(EXPERT)
        assert value.dtype == torch.bfloat16
        assert torch.equal(checkpoint.read(EXPERT, 3), value[3])
        assert torch.equal(value, load_file(tmp_path / "a" / checkpoint.files[EXPERT])[EXPERT])

    def test_what_was_read_may_be_changed(self, shared: Path) -> None:
        checkpoint = Checkpoint(shared)
        before = checkpoint.read(EXPERT)
        checkpoint.read(EXPERT).zero_()
        checkpoint.read(EXPERT, 0).zero_()
        assert torch.equal(checkpoint.read(EXPERT), before)

    def test_it_travels_to_other_processes(self, shared: Path) -> None:
        checkpoint = Checkpoint(shared)
        expected = checkpoint.read(EXPERT)
        assert torch.equal(pickle.loads(pickle.dumps(checkpoint)).read(EXPERT), expected)

    def test_a_single_file_wins_over_a_stale_index(self, shared: Path, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "a", "qwen2_moe", max_shard_size="1GB")
        shutil.copy(shared / INDEX, folder / INDEX)
        checkpoint = Checkpoint(folder)
        assert set(checkpoint.files.values()) == {SINGLE}
        rewrite(checkpoint, {}, tmp_path / "out")
        assert not (tmp_path / "out" / INDEX).exists()


class TestRefused:
    def test_missing_shard(self, folder: Path) -> None:
        (folder / "model-00003-of-00006.safetensors").unlink()
        with pytest.raises(ConfigError, match=r"model-00003-of-00006\.safetensors: no such file"):
            Checkpoint(folder)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated_shard(self, folder: Path, keep: int) -> None:
        path = folder / "model-00002-of-00006.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ConfigError, match=r"model-00002-of-00006\.safetensors: truncated"):
            Checkpoint(folder)

    def test_tensor_of_the_index_is_not_in_its_shard(self, folder: Path) -> None:
        shard = Checkpoint(folder).files[EXPERT]
        edit_tensors(folder / shard, **{EXPERT: None})
        with pytest.raises(ConfigError, match=rf"{shard}: tensor '{EXPERT}' is missing"):
            Checkpoint(folder)

    def test_pickles_only(self, tmp_path: Path, shared: Path) -> None:
        shutil.copy(shared / "config.json", tmp_path)
        with pytest.raises(ConfigError, match="safetensors only; .* found no weights"):
            Checkpoint(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(ConfigError, match=r"safetensors only; .* found pytorch_model\.bin"):
            Checkpoint(tmp_path)

    def test_index_that_leaves_the_folder(self, folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
        with pytest.raises(ConfigError, match=r"must name files of this folder.*\.\./other"):
            Checkpoint(folder)

    @pytest.mark.parametrize("text", ["{", "[1]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{}"])
    def test_malformed_index(self, folder: Path, text: str) -> None:
        (folder / INDEX).write_text(text)
        with pytest.raises(ConfigError, match=INDEX):
            Checkpoint(folder)

    def test_dense_model_and_incomplete_config(self, folder: Path) -> None:
        edit_config(folder, num_hidden_layers=3, model_type="llama")
        with pytest.raises(ConfigError, match="'llama'"):
            Checkpoint(folder)
        (folder / "config.json").write_text('{"model_type": "qwen2_moe"}')
        with pytest.raises(ConfigError, match=r"config\.json: key 'num_hidden_layers' is missing"):
            Checkpoint(folder)
        with pytest.raises(ConfigError, match="key 'num_experts_per_tok' is missing"):
            shape_of({"model_type": "olmoe", "num_hidden_layers": 2, "num_experts": 4})

    def test_a_shard_that_shrinks_after_it_was_opened(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        path = folder / checkpoint.files[EXPERT]
        path.write_bytes(path.read_bytes()[: checkpoint.entries[EXPERT].start + 5])
        with pytest.raises(ConfigError, match=r"truncated, 2043 bytes of a tensor are missing"):
            checkpoint.read(EXPERT)
        path.unlink()
        with pytest.raises(ConfigError, match=rf"{path.name}: not readable"):
            checkpoint.read(EXPERT)

    def test_router_under_another_name(self, folder: Path) -> None:
        shard = Checkpoint(folder).files[ROUTER]
        renamed = ROUTER.replace("gate", "router")
        edit_tensors(folder / shard, **{ROUTER: None, renamed: torch.zeros(8, 32)})
        text = (folder / INDEX).read_text().replace(ROUTER, renamed)
        (folder / INDEX).write_text(text)
        with pytest.raises(ConfigError, match=rf"router '{ROUTER}' is missing.*qwen2_moe.*{renamed}"):
            Checkpoint(folder).identity("x")

    def test_unknown_tensor(self, shared: Path) -> None:
        with pytest.raises(MismatchError, match=r"no tensor 'model\.nope'"):
            Checkpoint(shared).read("model.nope")


def quantised(
    matrix: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float8, scales, bfloat16 that they stand for) of `matrix` (M, N), block by block: scale = largest / 448."""
    rows, columns = (-(-size // step) for size, step in zip(matrix.shape, block, strict=True))
    weight, values = matrix.to(torch.float8_e4m3fn), matrix.bfloat16()
    scale = torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = matrix[at].abs().max() / 448
            weight[at] = (matrix[at] / scale[i, j]).to(torch.float8_e4m3fn)
            values[at] = (weight[at].float() * scale[i, j]).bfloat16()
    return weight, scale, values


def save_float8(source: Path, folder: Path, names: dict[str, torch.Tensor], block: list[int] | None) -> Path:
    """A copy of `source` in one file, with these matrices in float8 and their scales beside them."""
    folder.mkdir()
    base = Checkpoint(source)
    tensors = {name: base.read(name) for name in base.files}
    for name, matrix in names.items():
        tensors[name], tensors[name + "_scale_inv"], _ = quantised(matrix, tuple(block or (128, 128)))
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    shutil.copy(source / "config.json", folder)
    edit_config(folder, quantization_config={"weight_block_size": block} if block else {})
    return folder


class TestFloat8:
    @pytest.mark.parametrize("shape", [(130, 200), (128, 256), (5, 129), (256, 1)])
    @pytest.mark.parametrize("block", [None, [128, 128], [64, 32]], ids=str)
    def test_reads_the_values_it_stands_for(
        self, shared: Path, tmp_path: Path, shape: tuple[int, int], block: list[int] | None
    ) -> None:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(
            -3, 3, shape[1]
        )
        checkpoint = Checkpoint(save_float8(shared, tmp_path / "a", {EXPERT: matrix}, block))
        _, _, expected = quantised(matrix, tuple(block or (128, 128)))
        assert checkpoint.read(EXPERT).dtype == torch.bfloat16
        assert torch.equal(checkpoint.read(EXPERT), expected)
        assert torch.equal(checkpoint.read(EXPERT, 4), expected[4])
        torch.testing.assert_close(
            expected.float(), matrix, rtol=0.07, atol=float(matrix.abs().max()) / 448 / 256
        )
        target = torch.empty(shape)
        checkpoint.read_into(EXPERT, target)
        assert torch.equal(target, expected.float())

    def test_scales_are_no_parameters(self, shared: Path, tmp_path: Path) -> None:
        base = Checkpoint(shared)
        checkpoint = Checkpoint(save_float8(shared, tmp_path / "a", {EXPERT: base.read(EXPERT)}, [16, 16]))
        assert checkpoint.info(EXPERT) == ("F8_E4M3", (32, 16))
        assert checkpoint.files.keys() == checkpoint.entries.keys() == base.files.keys()
        with pytest.raises(MismatchError, match="no tensor"):
            checkpoint.info(EXPERT + "_scale_inv")
        assert checkpoint.num_parameters == base.num_parameters
        assert checkpoint.identity("x").num_parameters == base.num_parameters
        assert pickle.loads(pickle.dumps(checkpoint)).read(EXPERT).dtype == torch.bfloat16

    def test_missing_or_misshapen_scales(self, shared: Path, tmp_path: Path) -> None:
        matrix = torch.ones(130, 200)
        folder = save_float8(shared, tmp_path / "a", {EXPERT: matrix}, None)
        edit_tensors(folder / SINGLE, **{EXPERT + "_scale_inv": torch.ones(2, 1)})
        with pytest.raises(ConfigError, match=rf"{EXPERT}_scale_inv' is F32 \(2, 1\).*has F32 \(2, 2\)"):
            Checkpoint(folder)
        edit_tensors(folder / SINGLE, **{EXPERT + "_scale_inv": None})
        with pytest.raises(ConfigError, match=rf"'{EXPERT}_scale_inv' is missing"):
            Checkpoint(folder)
        edit_config(folder, quantization_config={"weight_block_size": [0, 128]})
        with pytest.raises(ConfigError, match=r"weight_block_size .*\[0, 128\]"):
            Checkpoint(folder)

    def test_copies_keep_the_scales_and_refuse_to_replace_what_they_scale(
        self, shared: Path, tmp_path: Path
    ) -> None:
        matrix = torch.randn(40, 33)
        checkpoint = Checkpoint(save_float8(shared, tmp_path / "a", {EXPERT: matrix}, [16, 16]))
        router = {ROUTER: torch.randn(8, 32)}
        rewrite(checkpoint, router, tmp_path / "out")
        assert torch.equal(Checkpoint(tmp_path / "out").read(EXPERT), checkpoint.read(EXPERT))
        for tensor in (checkpoint.read(EXPERT), checkpoint.read(EXPERT).to(torch.float8_e4m3fn)):
            with pytest.raises(
                MismatchError, match=rf"'{EXPERT}'.*float8_e4m3fn \(40, 33\) in scaled blocks"
            ):
                rewrite(checkpoint, {EXPERT: tensor}, tmp_path / "again")


class TestIdentity:
    def fingerprint(self, folder: Path) -> str:
        return Checkpoint(folder).identity("any").fingerprint

    def test_says_what_it_is(self, shared: Path) -> None:
        identity = Checkpoint(shared).identity("embedded:x", "v1")
        assert (identity.name, identity.revision, identity.model_type) == ("embedded:x", "v1", "qwen2_moe")
        assert identity.num_parameters == Checkpoint(shared).num_parameters

    def test_is_the_same_however_it_was_saved(self, folder: Path, tmp_path: Path) -> None:
        edit_config(folder, transformers_version="4.0", _name_or_path="/elsewhere", torch_dtype="float16")
        whole = save_tiny(tmp_path / "whole", "qwen2_moe", max_shard_size="1GB")
        assert self.fingerprint(folder) == self.fingerprint(whole)

    def test_changes_with_one_bit_of_a_router(self, folder: Path) -> None:
        before, checkpoint = self.fingerprint(folder), Checkpoint(folder)
        changed = checkpoint.read(ROUTER)
        changed.view(torch.uint8)[3, 5] ^= 1
        edit_tensors(folder / checkpoint.files[ROUTER], **{ROUTER: changed})
        assert self.fingerprint(folder) != before

    def test_changes_with_the_config_and_with_a_dtype(self, folder: Path) -> None:
        seen = {self.fingerprint(folder)}
        edit_config(folder, rms_norm_eps=1e-5)
        seen.add(self.fingerprint(folder))
        checkpoint = Checkpoint(folder)
        edit_tensors(folder / checkpoint.files[EXPERT], **{EXPERT: checkpoint.read(EXPERT).bfloat16()})
        seen.add(self.fingerprint(folder))
        assert len(seen) == 3


class TestDigest:
    def test_is_the_hash_that_it_says(self) -> None:
        tensor = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
        expected = hashlib.sha256(b"torch.bfloat16 (1, 2)\n" + bytes([0x80, 0x3F, 0x00, 0xC0])).hexdigest()
        assert digest(tensor) == expected

    @given(
        st.integers(0, 5),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
    )
    def test_sees_dtype_shape_and_every_bit(self, size: int, dtype: torch.dtype) -> None:
        tensor = torch.arange(size * 3).reshape(size, 3).to(dtype)
        assert digest(tensor) == digest(tensor.clone()) == digest(tensor.t().contiguous().t())
        assert digest(tensor) != digest(tensor.flatten())
        assert digest(tensor) != digest(tensor.to(torch.float64))
        for index in range(tensor.numel()):
            other = tensor.clone()
            other.flatten().view(torch.uint8)[index * tensor.element_size()] ^= 1
            assert digest(other) != digest(tensor)

    def test_scalars_and_special_values(self) -> None:
        assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))
        assert digest(torch.tensor(math.nan)) == digest(torch.tensor(math.nan))
        assert digest(torch.nn.Parameter(torch.ones(2))) == digest(torch.ones(2))


class TestRewrite:
    def test_exchanges_these_bytes_and_no_others(self, folder: Path, tmp_path: Path) -> None:
        for name in (
            "pytorch_model.bin",
            "x.pt",
            "modeling.py",
            "pytorch_model.bin.index.json",
            "other.safetensors",
        ):
            (folder / name).write_text("{}")
        (folder / "tokenizer.json").write_text('{"a": 1}')
        base, out = Checkpoint(folder), tmp_path / "new" / "out"
        replacements = {EXPERT: torch.randn(32, 16), ROUTER: torch.randn(32, 8).t()}
        rewrite(base, replacements, out)

        written = Checkpoint(out)
        for name in base.files:
            assert torch.equal(written.read(name), replacements.get(name, base.read(name))), name
        kept = {"config.json", "generation_config.json", "tokenizer.json", INDEX, *base.files.values()}
        assert {path.name for path in out.iterdir()} == kept
        touched = {base.files[name] for name in replacements}
        for name in kept - touched:
            assert (out / name).read_bytes() == (folder / name).read_bytes()
        for name in kept:
            assert not (out / name).samefile(folder / name)
        for name in touched:
            assert header(out / name) == header(folder / name)
            with safe_open(out / name, framework="pt") as file:
                assert file.metadata() == {"format": "pt"}
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        AutoModelForCausalLM.from_pretrained(out)

    def test_links_of_a_hub_cache_become_files(self, folder: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        for path in folder.iterdir():
            (snapshot / path.name).symlink_to(path)
        rewrite(Checkpoint(snapshot), {}, tmp_path / "out")
        assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())

    def test_an_empty_folder_is_filled_and_a_full_one_refused(self, shared: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        rewrite(Checkpoint(shared), {}, out)
        with pytest.raises(ConfigError, match=r"out: exists and is not empty"):
            rewrite(Checkpoint(shared), {}, out)
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigError, match=r"file: exists and is not empty"):
            rewrite(Checkpoint(shared), {}, tmp_path / "file")

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("model.nope", torch.zeros(1), r"no tensor 'model\.nope'"),
            (ROUTER, torch.zeros(8, 31), rf"'{ROUTER}'.*\(8, 32\).*\(8, 31\)"),
            (ROUTER, torch.zeros(8, 32).bfloat16(), rf"'{ROUTER}'.*float32.*bfloat16"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_writing(
        self, shared: Path, tmp_path: Path, name: str, tensor: torch.Tensor, message: str
    ) -> None:
        with pytest.raises(MismatchError, match=message):
            rewrite(Checkpoint(shared), {name: tensor}, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_failure_half_way_leaves_nothing(self, folder: Path, tmp_path: Path) -> None:
        base = Checkpoint(folder)
        os.remove(folder / "model-00004-of-00006.safetensors")
        with pytest.raises(FileNotFoundError, match="model-00004-of-00006"):
            rewrite(base, {}, tmp_path / "new" / "out")
        assert not list((tmp_path / "new").iterdir())
