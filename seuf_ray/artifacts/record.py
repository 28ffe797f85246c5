"""What all artifacts are: frozen, strict, fingerprinted, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seuf_ray.errors import ConfigError, MismatchError


class Record(BaseModel):
    """Frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Statistic(Record):
    """An exact mean: what was summed, and over how many. Means of means never occur."""

    sum: float
    count: float

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else float("nan")


class ModelIdentity(Record):
    """Which checkpoint an artifact speaks of; `fingerprint` covers config, tensor names and all router weights."""

    name: str
    revision: str | None
    model_type: str
    num_parameters: int
    fingerprint: str


class DataSummary(Record):
    """What a reader found."""

    sources: list[str]
    num_texts: int
    num_rows: int
    num_tokens: int
    num_bad_rows: int = 0
    first_bad: str = Field("", description="place of the first malformed row, and what is wrong with it")


class Provenance(Record):
    """How an artifact came to be."""

    seed: int
    made_from: dict[str, str]
    packages: dict[str, str]


def provenance(seed: int, **made_from: str) -> Provenance:
    """The provenance of an artifact made now from the artifacts with these fingerprints."""
    return Provenance(seed=seed, made_from=made_from, packages=dict(_packages()))


@cache
def _packages() -> dict[str, str]:
    """The versions of what numbers depend on, read once: it takes longer than a search's trial to begin."""
    names = ("seuf-ray", "torch", "transformers", "ray", "deepspeed", "safetensors")
    return {name: version(name) for name in names}


class Artifact(Record):
    """A record with a file name, a fingerprint and a provenance."""

    kind: str
    model: ModelIdentity
    provenance: Provenance

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of everything else in the record."""
        return fingerprint(self.model_dump(mode="json"))

    def write(self, path: Path) -> Path:
        """Write as JSON, aside and renamed, so that a reader never sees half a file."""
        document = {**self.model_dump(mode="json"), "fingerprint": self.fingerprint}
        write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ConfigError for a missing or malformed file, MismatchError for one that was changed by hand."""
        try:
            document = dict(json.loads(path.read_text(encoding="utf-8")))
            claimed = document.pop("fingerprint")
            artifact = cls.model_validate(document)
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: no such file; run the stage that makes it first") from error
        except OSError as error:  # a folder, or a file of somebody else's
            raise ConfigError(f"{path}: cannot be read as a {cls.__name__}: {error.strerror}") from error
        except (ValidationError, ValueError, KeyError, AttributeError, TypeError) as error:
            why = f"no key {error}" if isinstance(error, KeyError) else error
            raise ConfigError(f"{path}: not a {cls.__name__}: {why}") from error
        if artifact.fingerprint != claimed:
            raise MismatchError(
                f"{path}: content {artifact.fingerprint[:12]} differs from its fingerprint {claimed[:12]}"
            )
        return artifact

    def require_model(self, model: ModelIdentity, path: Path) -> None:
        """Raises MismatchError where this artifact speaks of another checkpoint than `model`."""
        if self.model.fingerprint != model.fingerprint:
            raise MismatchError(
                f"{path} was made for model {self.model.name!r} ({self.model.fingerprint[:12]}), "
                f"this job's model is {model.name!r} ({model.fingerprint[:12]})"
            )


def fingerprint(document: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON (sorted keys, no spaces) of `document`."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write aside, fsync, rename: the file at `path` is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
