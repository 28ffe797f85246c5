"""Plug-ins by file name: `find("algorithms", "npo")` is the one class that `algorithms/npo.py` defines.

A plug-in is a pydantic class: its fields are its hyper-parameters (and so config keys, command-line overrides and
search keys), its `loss` is the formula. A name with a dot is a module path outside this package
(`my_lab.my_algorithm`), so a plug-in needs no registration anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

from seuf_ray.errors import ConfigError, did_you_mean


class Plugin(BaseModel):
    """Base of every plug-in: frozen, and unknown hyper-parameters are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str

    def depth(self, targets: Any) -> int | None:
        """How many decoder layers its passes must run; None: all of them and the language-model head.

        Args:
            targets: the plan's `passes.Targets`.
        """
        return None


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
