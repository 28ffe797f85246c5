"""Plug-ins by file name: `find("algorithms", "npo")` is the one class that `algorithms/npo.py` defines.

A plug-in is a pydantic class: its fields are its hyper-parameters (and so config keys, command-line overrides and
search keys), its `loss` is the formula. A name with a dot is a module path outside this package
(`my_lab.my_algorithm`), so a plug-in needs no registration anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from seuf_ray.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Reads:
    """What a loss reads of one pass; what nobody reads is not computed.

    Attributes:
        depth: decoder layers that must run; None: all of them and the language-model head.
        hidden: decoder layers whose output (B, T, D) is kept, as `Forward.hidden`.
        logits: whether the head's logits (B, T-1, V) are kept, as `Forward.logits`, besides log-probabilities.
        router_inputs: MoE layers whose router's inputs (N, D) are kept, as `Forward.router_inputs`.
    """

    depth: int | None = None
    hidden: frozenset[int] = frozenset()
    logits: bool = False
    router_inputs: frozenset[int] = frozenset()

    def __or__(self, other: Reads) -> Reads:
        """What serves both."""
        depths = (self.depth, other.depth)
        depth = None if None in depths else max(d for d in depths if d is not None)
        return Reads(
            depth,
            self.hidden | other.hidden,
            self.logits or other.logits,
            self.router_inputs | other.router_inputs,
        )


# What may be written where pydantic alone would take more: true for 1, "1e-3" for a number, "yes" for true.
WRITTEN: dict[type, tuple[tuple[type, ...], str]] = {
    float: ((float, int), "Input should be a valid number"),
    int: ((int,), "Input should be a valid integer"),
    bool: ((bool,), "Input should be true or false"),
}


class Table(BaseModel):
    """A table of a job file: frozen, a key that is not declared is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_is_written(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        for kind in (annotation, *get_args(annotation)):
            types, expected = WRITTEN.get(kind, ((), "")) if isinstance(kind, type) else ((), "")
            if types and type(value) in (str, bool, int, float) and type(value) not in types:
                raise ValueError(expected)
        return value


class Plugin(Table):
    """Base of every plug-in: its fields are its hyper-parameters."""

    name: str

    def reads(self, targets: Any, name: str) -> Reads | None:
        """What its loss reads of the pass called `name` (a parameter of `loss`); default: log-probabilities.

        None: with these hyper-parameters it needs no such pass, and takes None in its place.

        Args:
            targets: the plan's `passes.Targets`.

        Raises:
            ConfigError: a hyper-parameter names what these targets or this model do not have.
        """
        return Reads()


def available(kind: str) -> list[str]:
    """The names of the plug-ins of `kind` that this package ships, without importing any of them."""
    folder = Path(__file__).parent / kind
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def find(kind: str, name: str) -> type[Plugin]:
    """The plug-in class called `name`.

    Raises:
        ConfigError: no such file in `kind`, no such module, or a module without exactly one plug-in class.
    """
    if "." not in name and name not in available(kind):
        raise ConfigError(f"{name!r} is not one of the {kind}: {did_you_mean(name, available(kind))}")
    path = name if "." in name else f"seuf_ray.{kind}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        is_itself = error.name is not None and path.startswith(error.name)
        advice = "a dotted name is an importable module path" if is_itself else f"{path} imports it"
        raise ConfigError(f"{name!r} ({kind}): {error}; {advice}") from error
    return _sole_class(module)


def _sole_class(module: ModuleType) -> type[Plugin]:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Plugin) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"module {module.__name__} must define exactly one plug-in class, found {len(classes)}"
        )
    return classes[0]
