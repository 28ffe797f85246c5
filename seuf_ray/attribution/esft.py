"""ESFT's expert configurations: its rule over our scores, and its JSON.

    per layer, experts by descending score until their cumulative share of the layer's score reaches p

    {"experts": {"1": [5, 12], "2": [0]}, "shared_experts": false, "non_expert_modules": false}

Normalising over the experts of a layer with `token_share` and p = 0.2 gives the configurations that were released with
ESFT (arXiv 2407.01906) for DeepSeek-V2-Lite; the script there normalises over another axis.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from seuf_ray.artifacts import AttributionReport, Expert, LayerScores, write_text
from seuf_ray.errors import ConfigError


def esft_experts(report: AttributionReport, share: float) -> list[Expert]:
    """The experts that the rule chooses by the report's score, layer by layer, best first; at least one a layer."""
    return [(row.layer, index) for row in report.layers for index in _leading(row, report, share)]


def _leading(row: LayerScores, report: AttributionReport, share: float) -> Iterator[int]:
    values = row.values(report.score)
    # Token shares add up to 1, and ESFT takes its rounded ones as if they did.
    total, reached = 1.0 if report.score == "token_share" else sum(values), 0.0
    for index in sorted(range(len(values)), key=lambda i: (-values[i], i)):
        yield index
        reached += values[index]
        if reached >= share * total:
            return


def write_experts(path: Path, experts: Iterable[Expert]) -> Path:
    """Write `experts` as ESFT reads them: whole routed experts train, nothing else."""
    layers = groupby(sorted(experts, key=lambda expert: expert[0]), key=lambda expert: expert[0])
    chosen = {str(layer): [index for _, index in group] for layer, group in layers}
    document = {"experts": chosen, "shared_experts": False, "non_expert_modules": False}
    write_text(path, json.dumps(document) + "\n")
    return path


def read_experts(path: Path) -> list[Expert]:
    """The experts of an ESFT configuration.

    Raises:
        ConfigError: no such file, not ESFT's JSON, or one that trains more than routed experts.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        experts = [
            (int(layer), int(index)) for layer, chosen in document["experts"].items() for index in chosen
        ]
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{path}: not an ESFT expert configuration ({{"experts": {{"LAYER": [INDEX, ...]}}}}): {error}'
        ) from error
    for key in ("shared_experts", "non_expert_modules"):
        if document.get(key):
            raise ConfigError(f"{path}: {key} = true is not supported, routed experts only")
    return experts
