"""Trained tensors on disk under checkpoint names: write, verify, apply, diff.

    patch.safetensors   the new tensors, in the dtype that the base stores
    manifest.json       PatchManifest: the plan, the job, and every tensor's sha256 before and after

The names are those of hub checkpoints, so applying means exchanging bytes in a few shards and any server can
read the result. Of the tensors it replaces a patch keeps digests only: they hold what was to be forgotten.
It is refused on any checkpoint but the one it was trained on. torch is imported by commands, not by `--help`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seuf_ray.artifacts import ModelIdentity, PatchManifest, Provenance, TensorChange, UnlearningPlan
from seuf_ray.checkpoint.diff import Difference, diff, print_diff
from seuf_ray.checkpoint.folder import Checkpoint, digest, resolve, rewrite
from seuf_ray.checkpoint.shards import header, sync
from seuf_ray.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Difference", "apply", "diff", "read", "require_storable", "verify", "write"]
WEIGHTS, MANIFEST = "patch.safetensors", "manifest.json"
_TRAINABLE = ("F64", "F32", "F16", "BF16")


def write(
    folder: Path,
    base: Checkpoint,
    model: ModelIdentity,
    plan: UnlearningPlan,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    provenance: Provenance,
) -> PatchManifest:
    """Write `tensors` as a patch of `base`, cast to the dtypes it stores; the manifest comes last.

    Raises:
        ValueError: no tensors, or one that is not finite.
        MismatchError: a tensor that is not in the plan or not in `base`, or that has another shape there; a
            plan or a `model` that speaks of another checkpoint.
    """
    from safetensors.torch import save_file

    if not tensors:
        raise ValueError(f"{folder}: an empty patch: no trained tensors were given")
    plan.require_model(model, Path("the plan"))
    _require_base(base, model, folder)
    if stray := sorted(tensors.keys() - set(plan.tensors)) if plan.tensors else []:
        raise MismatchError(
            f"{folder}: tensor {stray[0]!r} is not one of the plan's {len(plan.tensors)} tensors"
        )
    pairs = [_change(base, name, tensors[name]) for name in sorted(tensors)]
    manifest = PatchManifest(
        model=model, provenance=provenance, plan=plan, config=config, tensors=[change for change, _ in pairs]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(
        missing_ok=True
    )  # an old one would speak of other tensors until the new one is there
    aside = folder / f".{WEIGHTS}.{os.getpid()}"
    save_file({change.name: tensor for change, tensor in pairs}, aside, metadata=_metadata(manifest))
    aside.chmod(0o644)  # safetensors leaves 0600, unlike the manifest beside it
    sync(aside)
    aside.replace(folder / WEIGHTS)
    manifest.write(folder / MANIFEST)
    return manifest


def _change(base: Checkpoint, name: str, tensor: Tensor) -> tuple[TensorChange, Tensor]:
    """The manifest's row for a trained tensor, and the tensor as the base would store it."""
    dtype, shape = base.info(name)
    if tuple(tensor.shape) != shape:
        raise MismatchError(
            f"tensor {name!r}: {base.folder} stores {shape}, the trained one is {tuple(tensor.shape)}"
        )
    require_storable(base, [name])
    original = base.read(name)
    stored = tensor.detach().cpu().to(original.dtype).contiguous().clone()
    if bad := int((~stored.isfinite()).sum()):
        raise ValueError(
            f"tensor {name!r}: {bad} of {stored.numel()} values are not finite as {dtype}; not written"
        )
    row = TensorChange(
        name=name, dtype=dtype, shape=list(shape), base_sha256=digest(original), sha256=digest(stored)
    )
    return row, stored


def require_storable(base: Checkpoint, names: Iterable[str]) -> None:
    """Ask before training whether `write` can store these tensors.

    Block-scaled float8 is refused though new blocks and scales would fit in place of the old ones: with three
    bits of mantissa, rounding undoes every change of less than 3 to 6 %, so what is applied is not what was
    evaluated. Storing such a tensor as bfloat16 among float8 ones is no way out: transformers keeps the experts of
    a layer in one tensor of one dtype.

    Raises:
        MismatchError: `base` stores one of them in another dtype than a floating-point one of 16 bits or more.
    """
    for name in names:
        dtype, _ = base.info(name)
        if dtype not in _TRAINABLE:
            raise MismatchError(
                f"tensor {name!r}: {base.folder} stores {dtype}, whose scales a patch cannot renew; "
                f"allowed: {', '.join(_TRAINABLE)} (convert the checkpoint, for instance to bfloat16)"
            )


def _metadata(manifest: PatchManifest) -> dict[str, str]:
    return {"format": "pt", "base_model_fingerprint": manifest.model.fingerprint}


def read(folder: Path) -> tuple[PatchManifest, dict[str, Tensor]]:
    """The manifest and the tensors, each checked against its digest.

    Raises:
        ConfigError: one of the two files is missing.
        MismatchError: a file is truncated, or a tensor is not what the manifest says.
    """
    from safetensors.torch import load_file

    manifest, path = PatchManifest.read(folder / MANIFEST), folder / WEIGHTS
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file, though {MANIFEST} is there; copy the patch folder as a whole"
        )
    _require_declared(manifest, path)
    tensors: dict[str, Tensor] = load_file(path)
    for change in manifest.tensors:
        if digest(tensors[change.name]) != change.sha256:
            raise MismatchError(
                f"{path}: tensor {change.name!r} is corrupted: its sha256 is not the manifest's"
            )
    return manifest, tensors


def _require_declared(manifest: PatchManifest, path: Path) -> None:
    """The file's header says what the manifest says."""
    try:
        entries, metadata = header(path)
    except ConfigError as error:
        raise MismatchError(f"the patch is corrupted: {error}") from error
    declared = {change.name: (change.dtype, tuple(change.shape)) for change in manifest.tensors}
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    for name in sorted(declared.keys() | found.keys()):
        if declared.get(name) != found.get(name):
            here, there = found.get(name, "absent"), declared.get(name, "absent")
            raise MismatchError(f"{path}: tensor {name!r} is {here}, in {MANIFEST} it is {there}")
    if metadata != _metadata(manifest):
        raise MismatchError(f"{path}: its metadata is {metadata}, {MANIFEST} asks for {_metadata(manifest)}")


def verify(base: Checkpoint, folder: Path) -> PatchManifest:
    """The patch's manifest, after checking that its files are whole and that it was made for `base`.

    Raises:
        ConfigError: a file of the patch is missing.
        MismatchError: the patch is corrupted, or a tensor that it replaces is another one in `base`.
    """
    return _verified(base, folder)[0]


def _verified(base: Checkpoint, folder: Path) -> tuple[PatchManifest, dict[str, Tensor]]:
    manifest, tensors = read(folder)
    for change in manifest.tensors:
        if change.name not in base.files or digest(base.read(change.name)) != change.base_sha256:
            how = "differs" if change.name in base.files else "is missing"
            raise MismatchError(
                f"{folder}: the patch was made for model {manifest.model.name!r}; "
                f"tensor {change.name!r} {how} in {base.folder}"
            )
    _require_base(base, manifest.model, folder)
    return manifest, tensors


def _require_base(base: Checkpoint, model: ModelIdentity, folder: Path) -> None:
    found = base.identity(model.name).fingerprint
    if found != model.fingerprint:
        raise MismatchError(
            f"{folder}: the patch was made for model {model.name!r} ({model.fingerprint[:12]}); "
            f"config.json, tensor names or routers differ in {base.folder} ({found[:12]})"
        )


def apply(base_folder: Path, patch_folder: Path, out: Path) -> PatchManifest:
    """Write the checkpoint `out`: the base with the patch's tensors, read back before it gets its name.

    Raises:
        ConfigError: `out` exists and is not empty, or a file is missing.
        MismatchError: the patch is corrupted or was made for another base.
    """
    base = Checkpoint(base_folder)
    manifest, tensors = _verified(base, patch_folder)
    rewrite(base, tensors, out)
    return manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m seuf_ray.patch",
        description="Check, apply, compare. BASE, A and B are embedded:NAME, a Hugging Face folder, or a hub id.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, words, text in (
        ("verify", ("base", "patch"), "check that PATCH is whole and was made for BASE"),
        ("apply", ("base", "patch", "out"), "write BASE with PATCH applied as the new folder OUT"),
        ("diff", ("a", "b"), "list the tensors that differ between two checkpoints"),
    ):
        subparser = commands.add_parser(command, help=text, description=text)
        for word in words:
            subparser.add_argument(word, metavar=word.upper())
    subparser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table"
    )  # of diff, the last
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 1 with the reason on stderr."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "diff":
            print_diff(resolve(options.a), resolve(options.b), options.json)
        elif options.command == "verify":
            manifest = verify(Checkpoint(resolve(options.base)), Path(options.patch))
            print(f"{options.patch} fits {options.base}: {len(manifest.tensors)} tensors")
        else:
            manifest = apply(resolve(options.base), Path(options.patch), Path(options.out))
            print(f"{options.out}: {options.base} with {len(manifest.tensors)} tensors exchanged")
    except (ConfigError, MismatchError, OSError) as error:
        print(f"python -m seuf_ray.patch {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
