"""Patches: what was trained in memory is what `from_pretrained` loads after `apply`; nothing else changes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, PROVENANCE, VOCAB, save_tiny, tiny_plan
from transformers import AutoModelForCausalLM

from seuf_ray import patch
from seuf_ray.artifacts import PatchManifest
from seuf_ray.checkpoint.folder import Checkpoint, digest
from seuf_ray.checkpoint.shards import INDEX, SINGLE
from seuf_ray.errors import ConfigError, MismatchError

ROUTER = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.5.{}_proj.weight"
NAMES = [EXPERT.format(part) for part in ("down", "gate", "up")] + [ROUTER]
Tensors = dict[str, torch.Tensor]


def make_patch(folder: Path, base: Checkpoint, tensors: Tensors, *experts: tuple[int, int]) -> PatchManifest:
    plan = tiny_plan(base, *experts)
    return patch.write(folder, base, plan.model, plan, {"seed": 0}, tensors, PROVENANCE)


def noisy(base: Checkpoint, names: list[str], seed: int = 7) -> Tensors:
    """These tensors as training might leave them, in float32."""
    generator = torch.Generator().manual_seed(seed)
    stored = {name: base.read(name).float() for name in names}
    return {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in stored.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny(tmp_path_factory.mktemp("patch") / "base", "qwen2_moe"))


@pytest.fixture(scope="module")
def made(base: Checkpoint) -> Path:
    """A patch of expert 5 in layer 1 and its router, which tests only read."""
    folder = base.folder.parent / "patch"
    make_patch(folder, base, noisy(base, NAMES), (1, 5))
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(made, tmp_path / "patch"))


def change_in_memory(model: Any, base: Checkpoint, tensors: Tensors) -> None:
    """Write trained tensors into a loaded model, whose experts are fused: gate_up_proj (E, 2F, D), down_proj."""
    for name, tensor in tensors.items():
        expert = base.family.parse_expert(name)
        block = model.model.layers[int(name.split(".")[2])].mlp
        if expert is None:
            block.gate.weight.data.copy_(tensor)
        elif expert[2] == "down":
            block.experts.down_proj.data[expert[1]].copy_(tensor)
        else:
            block.experts.gate_up_proj.data[expert[1]].chunk(2)[expert[2] == "up"].copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_applied_equals_changed_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = Checkpoint(save_tiny(tmp_path / "base", family, dtype=dtype))
    experts = ((1, 5), (2, 0))
    tensors = noisy(base, tiny_plan(base, *experts).tensors)
    make_patch(tmp_path / "patch", base, tensors, *experts)
    patch.apply(base.folder, tmp_path / "patch", tmp_path / "out")

    ids = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    original = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)
    with torch.no_grad():
        before = original(ids).logits
        change_in_memory(original, base, tensors)
        expected = original(ids).logits
        applied = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)(ids).logits
    assert torch.equal(applied, expected)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert {d.name for d in patch.diff(base.folder, tmp_path / "out")} == set(tensors)


class TestWrite:
    def test_the_manifest_says_what_changed(self, base: Checkpoint, made: Path) -> None:
        manifest, tensors = patch.read(made)
        assert [change.name for change in manifest.tensors] == NAMES
        for change in manifest.tensors:
            assert change.base_sha256 == digest(base.read(change.name))
            assert change.sha256 == digest(tensors[change.name])
            assert (change.dtype, tuple(change.shape)) == base.info(change.name)
        assert manifest.model == base.identity("tiny")
        assert manifest.plan.experts == [(1, 5)]
        with safe_open(made / patch.WEIGHTS, framework="pt") as file:
            assert file.metadata()["base_model_fingerprint"] == manifest.model.fingerprint
        assert {path.name for path in made.iterdir()} == {patch.WEIGHTS, patch.MANIFEST}

    def test_views_of_one_tensor_are_stored_apart(self, base: Checkpoint, tmp_path: Path) -> None:
        both = torch.randn(16, 64)
        tensors = {EXPERT.format("gate"): both[:, :32], EXPERT.format("up"): both[:, 32:]}
        make_patch(tmp_path, base, tensors, (1, 5))
        assert all(torch.equal(value, tensors[name]) for name, value in patch.read(tmp_path)[1].items())

    def test_a_second_patch_replaces_the_first(self, base: Checkpoint, tmp_path: Path) -> None:
        make_patch(tmp_path, base, noisy(base, NAMES, 1), (1, 5))
        second = make_patch(tmp_path, base, noisy(base, [ROUTER], 2), (1, 5))
        assert patch.verify(base, tmp_path) == second
        assert len(second.tensors) == 1

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_values_that_are_not_finite(self, base: Checkpoint, tmp_path: Path, value: float) -> None:
        tensors = noisy(base, NAMES)
        tensors[ROUTER][2, 3] = value
        with pytest.raises(ValueError, match=rf"'{ROUTER}': 1 of 256 values are not finite"):
            make_patch(tmp_path / "patch", base, tensors, (1, 5))
        assert not (tmp_path / "patch").exists()

    def test_values_that_the_stored_dtype_cannot_hold(self, tmp_path: Path) -> None:
        base = Checkpoint(save_tiny(tmp_path / "base", "qwen2_moe", dtype=torch.float16))
        with pytest.raises(ValueError, match=rf"'{ROUTER}': 256 of 256 values are not finite as F16"):
            make_patch(tmp_path / "patch", base, {ROUTER: torch.full((8, 32), 1e6)}, (1, 5))

    def test_quantised_tensors(self, base: Checkpoint, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(base.folder, tmp_path / "base"))
        shard, scale = folder / base.files[ROUTER], ROUTER + "_scale_inv"
        eighth = {ROUTER: base.read(ROUTER).to(torch.float8_e4m3fn), scale: torch.ones(1, 1)}
        save_file({name: t.clone() for name, t in load_file(shard).items()} | eighth, shard)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][scale] = shard.name
        (folder / INDEX).write_text(json.dumps(index))
        message = rf"'{ROUTER}': .* stores F8_E4M3.*allowed: F64, F32.*convert the checkpoint"
        with pytest.raises(MismatchError, match=message):
            patch.require_storable(Checkpoint(folder), NAMES)
        with pytest.raises(MismatchError, match=message):
            make_patch(tmp_path / "patch", Checkpoint(folder), {ROUTER: torch.ones(8, 32)}, (1, 5))
        make_patch(
            tmp_path / "patch", Checkpoint(folder), noisy(base, NAMES[:3]), (1, 5)
        )  # the others are F32
        patch.apply(folder, tmp_path / "patch", tmp_path / "out")
        assert [d.name for d in patch.diff(folder, tmp_path / "out")] == NAMES[:3]

    @pytest.mark.parametrize(
        ("tensors", "error", "message"),
        [
            ({}, ValueError, "an empty patch"),
            ({"model.nope": torch.ones(1)}, MismatchError, r"no tensor 'model\.nope'"),
            ({ROUTER: torch.ones(32, 8)}, MismatchError, rf"'{ROUTER}'.*\(8, 32\).*\(32, 8\)"),
        ],
    )
    def test_what_the_base_does_not_have(
        self, base: Checkpoint, tmp_path: Path, tensors: Tensors, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            make_patch(tmp_path / "patch", base, tensors)
        assert not (tmp_path / "patch").exists()

    def test_a_tensor_outside_the_plan(self, base: Checkpoint, tmp_path: Path) -> None:
        with pytest.raises(MismatchError, match=r"'lm_head\.weight' is not one of the plan's 4 tensors"):
            make_patch(tmp_path, base, noisy(base, [ROUTER, "lm_head.weight"]), (1, 5))

    def test_a_plan_or_a_name_of_another_model(self, base: Checkpoint, tmp_path: Path) -> None:
        other = Checkpoint(save_tiny(tmp_path / "other", "qwen2_moe", seed=1))
        plan, tensors = tiny_plan(base, (1, 5)), noisy(base, NAMES)
        with pytest.raises(MismatchError, match="the plan was made for model 'tiny'"):
            patch.write(tmp_path, other, other.identity("other"), plan, {}, tensors, PROVENANCE)
        with pytest.raises(MismatchError, match="made for model 'tiny'.*routers differ in .*other"):
            patch.write(tmp_path, other, plan.model, plan, {}, tensors, PROVENANCE)


class TestRead:
    def test_missing_files(self, copied: Path) -> None:
        (copied / patch.WEIGHTS).unlink()
        with pytest.raises(ConfigError, match=r"patch\.safetensors: no such file"):
            patch.read(copied)
        (copied / patch.MANIFEST).unlink()
        with pytest.raises(ConfigError, match=r"manifest\.json: no such file"):
            patch.read(copied)

    @pytest.mark.parametrize("keep", [0, 7, 200, -1])
    def test_truncated(self, copied: Path, keep: int) -> None:
        path = copied / patch.WEIGHTS
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(MismatchError, match=r"corrupted: .*patch\.safetensors: truncated"):
            patch.read(copied)

    def test_another_value_names_the_tensor(self, copied: Path) -> None:
        path = copied / patch.WEIGHTS
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # the router is the last by name
        path.write_bytes(content)
        with pytest.raises(MismatchError, match=rf"tensor '{ROUTER}' is corrupted"):
            patch.read(copied)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {ROUTER: torch.ones(8, 31)},
                rf"tensor '{ROUTER}' is \('F32', \(8, 31\)\), in manifest.json it is",
            ),
            ({ROUTER: torch.ones(8, 32).half()}, rf"tensor '{ROUTER}' is \('F16', "),
            ({"model.more": torch.ones(1)}, r"tensor 'model\.more' is .* in manifest.json it is absent"),
            ({}, "its metadata is None|its metadata is {}"),
        ],
    )
    def test_other_tensors_than_the_manifest_says(self, copied: Path, changes: Tensors, message: str) -> None:
        path = copied / patch.WEIGHTS
        save_file({name: t.clone() for name, t in load_file(path).items()} | changes, path)
        with pytest.raises(MismatchError, match=message):
            patch.read(copied)

    def test_an_edited_manifest(self, copied: Path) -> None:
        path = copied / patch.MANIFEST
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
        with pytest.raises(MismatchError, match=r"manifest\.json: content .* differs from its fingerprint"):
            patch.read(copied)

    def test_every_bit_of_the_header_matters(self, copied: Path) -> None:
        path = copied / patch.WEIGHTS
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        flips = [(i, 1 << bit) for i in range(end) for bit in range(8)]
        padding = [i for i in range(end) if content[i] == ord(" ")]  # JSON takes other white space as well
        others = [(i, ord(" ") ^ ord(c)) for i in padding for c in "\t\n\r"]
        assert padding
        for position, mask in flips[:: 1 + len(flips) // 600] + others:
            self.flip(path, content, position, mask)
            with pytest.raises(MismatchError):
                patch.read(copied)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_every_byte_matters(self, made: Path, data: st.DataObject) -> None:
        content = (made / patch.WEIGHTS).read_bytes()
        position = data.draw(st.integers(0, len(content) - 1))
        mask = data.draw(st.integers(1, 255))
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(made / patch.MANIFEST, folder)
            self.flip(Path(folder) / patch.WEIGHTS, content, position, mask)
            with pytest.raises(MismatchError):
                patch.read(Path(folder))

    @staticmethod
    def flip(path: Path, content: bytes, position: int, mask: int) -> None:
        flipped = bytearray(content)
        flipped[position] ^= mask
        path.write_bytes(flipped)


class TestVerify:
    def test_another_base_names_the_tensor(self, base: Checkpoint, made: Path, tmp_path: Path) -> None:
        other = Checkpoint(save_tiny(tmp_path / "other", "qwen2_moe", seed=1))
        message = rf"patch was made for model 'tiny'; tensor '{NAMES[0]}' differs in .*other"
        with pytest.raises(MismatchError, match=message):
            patch.verify(other, made)
        with pytest.raises(MismatchError, match=message):
            patch.apply(other.folder, made, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_another_family_names_the_tensor(self, made: Path, tmp_path: Path) -> None:
        other = Checkpoint(save_tiny(tmp_path / "other", "mixtral"))
        with pytest.raises(MismatchError, match=rf"tensor '{NAMES[0]}' is missing in .*other"):
            patch.verify(other, made)

    def test_a_base_that_differs_elsewhere(self, base: Checkpoint, made: Path, tmp_path: Path) -> None:
        elsewhere = noisy(base, ["model.layers.2.mlp.gate.weight"])
        make_patch(tmp_path / "patch", base, elsewhere)
        patch.apply(base.folder, tmp_path / "patch", tmp_path / "other")
        with pytest.raises(MismatchError, match=r"routers differ in .*other"):
            patch.verify(Checkpoint(tmp_path / "other"), made)

    def test_not_twice(self, base: Checkpoint, made: Path, tmp_path: Path) -> None:
        patch.apply(base.folder, made, tmp_path / "out")
        with pytest.raises(MismatchError, match="differs"):
            patch.apply(tmp_path / "out", made, tmp_path / "again")


class TestDiff:
    def test_equal_folders(self, base: Checkpoint, tmp_path: Path) -> None:
        whole = save_tiny(tmp_path / "whole", "qwen2_moe", max_shard_size="1GB")
        assert patch.diff(base.folder, whole) == []

    def test_counts_values_and_bits(self, base: Checkpoint, tmp_path: Path) -> None:
        tensors = {ROUTER: base.read(ROUTER)}
        tensors[ROUTER][2, 3] += 0.5
        tensors[ROUTER][4, 1:3] -= 0.25
        make_patch(tmp_path / "patch", base, tensors)
        patch.apply(base.folder, tmp_path / "patch", tmp_path / "out")
        (found,) = patch.diff(base.folder, tmp_path / "out")
        assert (found.name, found.num_different, found.shape, found.note) == (ROUTER, 3, (8, 32), "")
        assert found.max_difference == pytest.approx(0.5, rel=1e-6)

    def test_zero_signs_and_nan(self, tmp_path: Path, base: Checkpoint) -> None:
        a = self.whole(tmp_path / "a", base, **{ROUTER: torch.tensor([0.0, math.nan, 1.0])})
        b = self.whole(tmp_path / "b", base, **{ROUTER: torch.tensor([-0.0, math.nan, 1.0])})
        assert patch.diff(a, b) == [patch.Difference(ROUTER, 1, 0.0, (3,))]
        assert patch.diff(a, a) == []

    def test_names_shapes_and_dtypes_of_one_side(self, tmp_path: Path, base: Checkpoint) -> None:
        same = torch.ones(2, 3)
        a = self.whole(tmp_path / "a", base, x2=same, x10=same, dtype=same, shape=same, both=same)
        b = self.whole(
            tmp_path / "b", base, y=same, dtype=same.half(), shape=same.t().contiguous(), both=same
        )
        found = {d.name: d for d in patch.diff(a, b)}
        assert list(found) == ["dtype", "shape", "x2", "x10", "y"]
        assert [d.note for d in found.values()] == [
            "F32 in A, F16 in B",
            "(2, 3) in A, (3, 2) in B",
            "only in A",
            "only in A",
            "only in B",
        ]
        assert (found["dtype"].num_different, found["dtype"].max_difference) == (0, 0.0)
        assert found["y"].num_different == 6
        assert math.isnan(found["y"].max_difference)

    def test_fused_experts_are_listed_one_by_one(self, tmp_path: Path, base: Checkpoint) -> None:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        fused = torch.randn(4, 3, 2)
        changed = fused.clone()
        changed[1, 0, 0] += 1
        changed[3] += 2
        a = self.whole(tmp_path / "a", base, **{name: fused, "fused.experts.down_proj": fused})
        b = self.whole(tmp_path / "b", base, **{name: changed})
        found = [(d.name, d.num_different, d.shape, d.note) for d in patch.diff(a, b)]
        assert found == [
            *((f"fused.experts.down_proj[{i}]", 6, (3, 2), "only in A") for i in range(4)),
            (f"{name}[1]", 1, (3, 2), ""),
            (f"{name}[3]", 6, (3, 2), ""),
        ]

    def whole(self, folder: Path, base: Checkpoint, **tensors: torch.Tensor) -> Path:
        folder.mkdir()
        shutil.copy(base.folder / "config.json", folder)
        save_file({name: t.clone() for name, t in tensors.items()}, folder / SINGLE, {"format": "pt"})
        return folder


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_patch_of_the_difference_makes_the_other_checkpoint(base: Checkpoint, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(base.files)), min_size=1, max_size=6, unique=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_patch(folder / "forth", base, noisy(base, names, data.draw(st.integers(0, 9))))
        patch.apply(base.folder, folder / "forth", folder / "other")
        other = Checkpoint(folder / "other")
        differences = [d.name for d in patch.diff(base.folder, other.folder)]
        assert sorted(differences) == sorted(names)

        make_patch(folder / "back", other, {name: base.read(name) for name in differences})
        patch.apply(other.folder, folder / "back", folder / "again")
        assert patch.diff(base.folder, folder / "again") == []


KILLED = """
import os, sys
from pathlib import Path
from seuf_ray import patch
from seuf_ray.checkpoint import shards
base, folder, out = map(Path, sys.argv[1:4])
steps, step, name = int(sys.argv[4]), 0, sys.argv[5]
original = getattr(shards, name)
def wait(*arguments):
    global step
    step += 1
    if step == steps:
        print("there", flush=True)
        sys.stdin.read()
    return original(*arguments)
setattr(shards, name, wait)
patch.apply(base, folder, out)
"""


@pytest.mark.chaos
@pytest.mark.parametrize(("function", "step"), [("copy", 5), ("sync", 10)])
def test_a_killed_apply_leaves_no_checkpoint(
    base: Checkpoint, made: Path, tmp_path: Path, function: str, step: int
) -> None:
    out = tmp_path / "out"
    arguments = [str(base.folder), str(made), str(out), str(step), function]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
    patch.apply(base.folder, made, out)  # what is left does not stand in the way
    assert Checkpoint(out).identity("tiny").fingerprint != base.identity("tiny").fingerprint


class TestCommandLine:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
        def call(*arguments: object) -> tuple[int, str, str]:
            code = patch.main([str(argument) for argument in arguments])
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        return call

    def test_verify_apply_diff(self, run: Any, base: Checkpoint, made: Path, tmp_path: Path) -> None:
        code, text, _ = run("verify", base.folder, made)
        assert (code, "4 tensors" in text) == (0, True)
        code, text, _ = run("apply", base.folder, made, tmp_path / "out")
        assert (code, "4 tensors" in text) == (0, True)
        code, text, _ = run("diff", base.folder, tmp_path / "out")
        lines = text.splitlines()
        assert code == 0
        assert [line.split()[0] for line in lines[:-1]] == NAMES
        assert "256 of 256 values differ" in lines[3]
        assert lines[-1] == f"4 of {len(base.files)} tensors differ"

    def test_diff_as_json(self, run: Any, base: Checkpoint, tmp_path: Path) -> None:
        mixtral = save_tiny(tmp_path / "mixtral", "mixtral")
        code, text, _ = run("diff", base.folder, mixtral, "--json")
        document = json.loads(text, parse_constant=pytest.fail)
        assert code == 0
        assert document["num_tensors"] == len(base.files.keys() | Checkpoint(mixtral).files.keys())
        assert {"only in A", "only in B", ""} == {row["note"] for row in document["differences"]}
        assert document["differences"][0].keys() >= {"name", "num_different", "max_difference", "shape"}

    @pytest.mark.parametrize("command", ["verify", "apply"])
    def test_errors_are_one_message(self, run: Any, made: Path, tmp_path: Path, command: str) -> None:
        out = [tmp_path / "out"] if command == "apply" else []
        for base, culprit in (("embedded:nope", "nope"), ("/no/such", "/no/such"), (tmp_path, "config.json")):
            code, text, error = run(command, base, made, *out)
            assert (code, text, culprit in error) == (1, "", True)
        code, _, error = run(command, save_tiny(tmp_path / "other", "qwen2_moe", seed=1), made, *out)
        assert (code, NAMES[0] in error) == (1, True)

    def test_help_is_quick_and_needs_no_torch(self) -> None:
        code = "import sys; from seuf_ray import patch; sys.exit('torch' in sys.modules)"
        started = time.monotonic()
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        assert time.monotonic() - started < 5  # 0.3 s where nothing else runs
        done = subprocess.run(
            [sys.executable, "-m", "seuf_ray.patch", "--help"], capture_output=True, check=True
        )
        assert b"verify" in done.stdout
