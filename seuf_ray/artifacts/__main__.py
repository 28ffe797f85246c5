"""Prints the JSON schema of every artifact: `python -m seuf_ray.artifacts`."""

import json
import sys

from seuf_ray.artifacts import (
    Artifact,
    AttributionReport,
    Comparison,
    EvaluationReport,
    PatchManifest,
    SearchReport,
    UnlearningPlan,
)

KINDS: list[type[Artifact]] = [
    AttributionReport,
    UnlearningPlan,
    PatchManifest,
    EvaluationReport,
    Comparison,
    SearchReport,
]

if __name__ == "__main__":
    json.dump({kind.__name__: kind.model_json_schema() for kind in KINDS}, sys.stdout, indent=1)
