"""What is wrong with a job file, in its own words: one line per mistake, beginning with its dotted path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from seuf_ray import plugins
from seuf_ray.config.section import DEFAULT_PLUGINS, LABEL_IN_WORDS
from seuf_ray.errors import did_you_mean

IN_WORDS = {  # kinds of mistakes that pydantic says in words of Python
    "model_type": "expected a table",
    "string_pattern_mismatch": f"allowed are {LABEL_IN_WORDS}",
}


def explain(kind: type[BaseModel], values: dict[str, Any], error: ValidationError) -> list[str]:
    """One line per mistake: dotted path, what is wrong, what is allowed."""
    lines: list[str] = []
    for item in error.errors():
        loc = item["loc"]
        where = ".".join(str(part) for part in loc)
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key; {_meant(kind, values, loc)}")
            continue
        message = IN_WORDS.get(item["type"]) or item["msg"].removeprefix("Value error, ")
        if item["type"] == "list_type" and isinstance(item["input"], dict):
            message = f"expected a list of tables: write [[{where}]]"
        got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
        is_said = not where or message.startswith(f"{where}.")  # what is about several keys names them itself
        lines.append(f"{message}{got}" if is_said else f"{where}: {message}{got}")
    return lines


def plugin_name(values: Mapping[str, Any], section: str) -> str:
    """The plug-in that `section` asks for."""
    value = values.get(section, {})
    return str(value.get("name", DEFAULT_PLUGINS[section]) if isinstance(value, dict) else value)


def _meant(kind: type[BaseModel], values: dict[str, Any], loc: Sequence[Any]) -> str:
    """What may stand there, and the key of this name where it is another table's."""
    allowed, key = _fields_at(kind, values, loc[:-1]), str(loc[-1])
    elsewhere = [path for path in _paths(kind) if path.rpartition(".")[2] == key]
    if not elsewhere:
        return did_you_mean(key, allowed)
    return f"did you mean {' or '.join(map(repr, elsewhere))}? allowed: {', '.join(sorted(allowed))}"


def _paths(kind: type[BaseModel]) -> Iterator[str]:
    """The keys of `kind` and of its tables, plug-ins' apart."""
    for name, field in kind.model_fields.items():
        yield name
        inside = field.annotation
        if isinstance(inside, type) and issubclass(inside, BaseModel):
            yield from (f"{name}.{key}" for key in inside.model_fields if inside is not plugins.Plugin)


def _fields_at(model: type[BaseModel], values: dict[str, Any], loc: Sequence[Any]) -> list[str]:
    """The keys that the table at `loc` may have."""
    if loc and loc[0] in ("algorithm", "anchor"):
        return list(plugins.find(f"{loc[0]}s", plugin_name(values, str(loc[0]))).model_fields)
    for part in loc:
        if not isinstance(part, int):
            annotation = model.model_fields[part].annotation
            found = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
            model = next((a for a in found if issubclass(a, BaseModel)), model)
    return list(model.model_fields)
