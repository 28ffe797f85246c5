"""What every table of the job file is made of: sections, sources, experts, plug-ins by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from seuf_ray import plugins
from seuf_ray.plugins import Plugin, Table

LABEL = r"^[\w .,+-]+$"
LABEL_IN_WORDS = "letters, digits, spaces and _ . , + -"  # a message shows no regular expression


class Section(Table):
    """A table of the job file with a fixed place in it."""


DEFAULT_PLUGINS = {"algorithm": "ga", "anchor": "kl"}  # where a section gives hyper-parameters only


def _plugin(section: str) -> Callable[[Any], Any]:
    def resolve(value: Any) -> Any:
        if isinstance(value, Plugin):
            return value
        if not isinstance(value, str | Mapping):
            example = f'{{name = "{DEFAULT_PLUGINS[section]}"}}'
            raise ValueError(f"expected a name or a table like {example}")
        values = {
            "name": DEFAULT_PLUGINS[section],
            **({"name": value} if isinstance(value, str) else dict(value)),
        }
        return plugins.find(f"{section}s", str(values["name"])).model_validate(values)

    return resolve


def _experts(value: Any) -> Any:
    """Of pydantic's own words there would be one line for each way in which neither a path nor pairs are there."""
    pairs = value if isinstance(value, list) else []
    is_pairs = isinstance(value, list) and all(_is_pair(pair) for pair in pairs)
    if not (value is None or isinstance(value, str | Path) or is_pairs):
        raise ValueError("expected [[layer, expert], ...] or a path")
    return value


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(part) is int for part in value)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Source = Annotated[str, Field(min_length=1)]  # "" would be the folder that the job runs in
Sources = Annotated[list[Source], BeforeValidator(_as_list), Field(min_length=1)]
Experts = Annotated[list[tuple[int, int]] | Path | None, BeforeValidator(_experts)]
Algorithm = Annotated[SerializeAsAny[Plugin], BeforeValidator(_plugin("algorithm"))]
Anchor = Annotated[SerializeAsAny[Plugin], BeforeValidator(_plugin("anchor"))]
