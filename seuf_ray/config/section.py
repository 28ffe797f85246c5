"""What every table of the job file is made of: frozen sections, sources, plug-ins by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

from seuf_ray import plugins
from seuf_ray.plugins import Plugin

LABEL = r"^[\w .,+-]+$"


class Section(BaseModel):
    """A table of the job file: frozen, and a key that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


DEFAULT_PLUGINS = {"algorithm": "ga", "anchor": "kl"}  # where a section gives hyper-parameters only


def _plugin(section: str) -> Callable[[Any], Any]:
    def resolve(value: Any) -> Any:
        if isinstance(value, Plugin):
            return value
        values = {
            "name": DEFAULT_PLUGINS[section],
            **({"name": value} if isinstance(value, str) else dict(value)),
        }
        return plugins.find(f"{section}s", str(values["name"])).model_validate(values)

    return resolve


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Source = Annotated[str, Field(min_length=1)]  # "" would be the folder that the job runs in
Sources = Annotated[list[Source], BeforeValidator(_as_list), Field(min_length=1)]
Algorithm = Annotated[SerializeAsAny[Plugin], BeforeValidator(_plugin("algorithm"))]
Anchor = Annotated[SerializeAsAny[Plugin], BeforeValidator(_plugin("anchor"))]
