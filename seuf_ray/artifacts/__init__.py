"""The records that stages hand over: frozen JSON, fingerprinted, each naming what it was made from.

    AttributionReport -> UnlearningPlan -> PatchManifest -> EvaluationReport

`fingerprint` is the sha256 of the record's canonical JSON without that field, so an artifact edited by hand is
refused; `made_from` holds the fingerprints of the inputs, so a plan made for another model is refused too.
`python -m seuf_ray.artifacts` prints the JSON schema of all of them.
"""

from seuf_ray.artifacts.attribution import AttributionReport, Expert, LayerScores, Score, Scores, Selection
from seuf_ray.artifacts.evaluation import Comparison, ComparisonRow, CurvePoint, EvaluationReport
from seuf_ray.artifacts.plan import IN_PLACE, LoRA, PatchManifest, TensorChange, UnlearningPlan
from seuf_ray.artifacts.record import (
    Artifact,
    DataSummary,
    ModelIdentity,
    Provenance,
    Record,
    Statistic,
    fingerprint,
    provenance,
    write_text,
)
from seuf_ray.artifacts.search import SearchReport, TrialPoint, TrialRecord

__all__ = [
    "IN_PLACE",
    "Artifact",
    "AttributionReport",
    "Comparison",
    "ComparisonRow",
    "CurvePoint",
    "DataSummary",
    "EvaluationReport",
    "Expert",
    "LayerScores",
    "LoRA",
    "ModelIdentity",
    "PatchManifest",
    "Provenance",
    "Record",
    "Score",
    "Scores",
    "SearchReport",
    "Selection",
    "Statistic",
    "TensorChange",
    "TrialPoint",
    "TrialRecord",
    "UnlearningPlan",
    "fingerprint",
    "provenance",
    "write_text",
]
