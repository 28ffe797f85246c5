"""Every key of a job file, for `--help`: those of plug-ins are read from their source, which imports torch."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from seuf_ray import plugins
from seuf_ray.config.section import DEFAULT_PLUGINS

PACKAGE = Path(plugins.__file__).parent
REQUIRED = ...  # what a key without a default has in its place, as in pydantic


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: dotted.
        default: a value, or `REQUIRED`.
        choices: all values that it may have, where these can be listed.
        description: what it means.
        owners: the plug-ins that have it; none: it is always there.
    """

    path: str
    default: Any
    choices: tuple[Any, ...]
    description: str
    owners: tuple[str, ...] = ()

    def __str__(self) -> str:
        owners = f" ({', '.join(self.owners)})" if self.owners else ""
        default = "" if self.default is REQUIRED else as_toml(self.default)
        default = default if default.startswith("[") else default and f"[{default}]"
        choices = f" ({' | '.join(map(str, self.choices))})" if self.choices else ""
        return f"  {self.path}{owners}{default and ' '}{default}{choices}\n      {self.description}"


def as_toml(value: Any) -> str:
    """`value` as a job file has it; TOML has no word for None."""
    if value is None:
        return "unset"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value if isinstance(value, bool | int | float) else str(value))


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The keys of `model` and of the tables in it."""
    for name, field in model.model_fields.items():
        kind, path = field.annotation, f"{prefix}{name}"
        if isinstance(kind, type) and issubclass(kind, BaseModel) and not field.validate_default:
            yield from keys_of(kind, f"{path}.")
            continue
        choices = get_args(kind) if all(isinstance(v, str | int) for v in get_args(kind)) else ()
        default = REQUIRED if field.is_required() else field.default
        yield Key(path, default, choices, field.description or "")
        if path in DEFAULT_PLUGINS:
            yield from plugin_keys(path)
        for row in get_args(kind):
            if isinstance(row, type) and issubclass(row, BaseModel):  # a list of tables
                yield from keys_of(row, f"{path}[].")


def plugin_keys(section: str) -> list[Key]:
    """The hyper-parameters of all plug-ins of `section`; one that several have alike is listed once."""
    found: dict[str, Key] = {}
    for name in plugins.available(f"{section}s"):
        own = {key.path: key for key in _fields(PACKAGE / f"{section}s" / f"{name}.py", section)}
        for key in own.values():  # of a field that a class has from its base and again, its own
            before = found.get(repr(key))
            found[repr(key)] = dataclasses.replace(key, owners=(*(before.owners if before else ()), name))
    return list(found.values())


def _fields(file: Path, section: str) -> Iterator[Key]:
    """The fields of the one plug-in class in `file`, those of its bases in this package first."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module or ""
        for node in module.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in module.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for base in node.bases:
            home = imported.get(ast.unparse(base), "").split(".")
            if home[0] == PACKAGE.name and home[1:] != ["plugins"]:
                yield from _fields(PACKAGE.joinpath(*home[1:]).with_suffix(".py"), section)
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) != "name":
                yield _field(line, section)


def _field(line: ast.AnnAssign, section: str) -> Key:
    """`beta: float = Field(0.1, gt=0, description="...")` as a key."""
    call = line.value if isinstance(line.value, ast.Call) else None
    words = {word.arg: word.value for word in call.keywords} if call else {}
    default = (call.args[0] if call.args else None) if call else line.value
    kind, choices = line.annotation, ()
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Literal":
        choices = _value(kind.slice)
    description = words.get("description")
    return Key(
        f"{section}.{ast.unparse(line.target)}",
        REQUIRED if default is None else _value(default),
        choices if isinstance(choices, tuple) else (choices,),
        str(_value(description)) if description is not None else "",
    )


def _value(node: ast.expr) -> Any:
    """What is written there, where it is no more than a value."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
