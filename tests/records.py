"""Artifacts and metrics as a run of the demo would leave them, made by hand for tests of what reads them."""

from __future__ import annotations

import math
import random
from typing import Any

from seuf_ray.artifacts import (
    AttributionReport,
    Comparison,
    ComparisonRow,
    CurvePoint,
    DataSummary,
    EvaluationReport,
    LayerScores,
    ModelIdentity,
    Provenance,
    Scores,
    Statistic,
    UnlearningPlan,
)

MODEL = ModelIdentity(
    name="embedded:specialised",
    revision="0123abc",
    model_type="qwen2_moe",
    num_parameters=4_219_000,
    fingerprint="fe" * 32,
)
MADE = Provenance(seed=7, made_from={"model": "fe" * 32}, packages={"torch": "2.13.0", "ray": "2.60.0"})
COMMON: dict[str, Any] = {"model": MODEL, "provenance": MADE}
DOMAINS = ("geography", "languages", "computing", "nature")


# -- artifacts as a run would leave them -------------------------------------------------------------------------


def attribution(layers: int = 4, experts: int = 16, source: str = "embedded:chemistry") -> AttributionReport:
    dice = random.Random(0)
    rows = [[dice.expovariate(24) for _ in range(experts)] for _ in range(layers)]
    rows[min(2, layers - 1)][5] = 0.46
    ranked = sorted((v for r in rows for v in r), reverse=True)
    scores = [
        LayerScores(
            layer=i + 1,
            affinity=r,
            router_score=r,
            token_share=r,
            retain=Scores(affinity=r[::-1], router_score=r[::-1], token_share=r[::-1]),
            rank=[ranked.index(v) + 1 for v in r],
            margin=[0.01] * experts,
            stability=[float(v == ranked[0]) for v in r],
        )
        for i, r in enumerate(rows)
    ]
    found = DataSummary(sources=[source], num_texts=1200, num_rows=1210, num_tokens=15_730, num_bad_rows=2)
    return AttributionReport(
        **COMMON,
        score="affinity",
        num_experts=experts,
        top_k=2,
        data=found,
        bootstrap=32,
        digest="d1" * 32,
        layers=scores,
        warnings=["The best expert leads by less than 5 %."],
    )


def plan(**changes: Any) -> UnlearningPlan:
    values: dict[str, Any] = {
        "scope": "model",
        "top_m": 1,
        "experts": [(3, 5)],
        "routers": [3],
        "tensors": ["a"],
        "num_trainable": 14_848,
        "trainable_fraction": 0.003519,
    }
    return UnlearningPlan(**COMMON, **{**values, **changes})


def evaluation(
    forget: float, utility: float, drift: float, source: str = "embedded:chemistry"
) -> EvaluationReport:
    def layers(values: list[float]) -> dict[int, Statistic]:
        return {layer + 1: Statistic(sum=value * 5000, count=5000) for layer, value in enumerate(values)}

    kept = [1.0, 1.0, 1 - drift, 1 - drift / 3]
    sets = {"forget": layers(kept), "retain": layers([1 - (1 - value) / 4 for value in kept])}
    kl = {
        name: layers([0.0, 0.0, drift * share, drift * share / 2])
        for name, share in (("forget", 1), ("retain", 0.2))
    }
    return EvaluationReport(
        **COMMON,
        patch=None,
        forget={source: Statistic(sum=round(forget * 400), count=400)},
        utility={
            f"embedded:{d}": Statistic(sum=round((utility - 0.01 * i) * 300), count=300)
            for i, d in enumerate(DOMAINS)
        },
        nll=Statistic(sum=1.9 * 9000 + 900 * drift, count=9000),
        overlap_top1=sets,
        overlap_topk=sets,
        kl=kl,
    )


def metrics(steps: int = 60) -> list[dict[str, float]]:
    records: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        share = step / steps
        record = {
            "step": step,
            "loss/forget": -1 - 5 * share,
            "loss/anchor": 0.02 * share,
            "grad_norm": 2 - share,
        }
        record["loss/total"] = record["loss/forget"] + record["loss/anchor"]
        if step % 10 == 0:
            record |= {"forget_accuracy": 0.93 - 0.62 * share, "utility": 0.92 - 0.05 * share**2}
            for layer in range(1, 5):
                lost = max(layer - 2, 0) * 0.05 * share
                for name, part in (("forget", 1.0), ("retain", 0.3)):
                    record[f"overlap_top1/{name}/{layer}"] = 1 - lost * part
                    record[f"overlap_topk/{name}/{layer}"] = 1 - lost * part / 2
                    record[f"kl/{name}/{layer}"] = lost * part / 4
        records.append(record)
    records[4]["grad_norm"] = math.nan
    records[7].pop("loss/anchor")
    return records


def _variant(name: str, end: float, kept: float, at: float | None, **changes: Any) -> ComparisonRow:
    curve = [
        CurvePoint(
            step=s,
            forget_accuracy=0.93 - (0.93 - end) * s / 60,
            utility=0.915 - (0.915 - kept) * (s / 60) ** 2,
        )
        for s in range(0, 61, 10)
    ]
    values: dict[str, Any] = {
        "overlap_top1": 0.9371,
        "kl": 0.01231,
        "trainable_fraction": 0.003519,
        "steps": 60,
    }
    values |= {"seconds": 41.27, "perplexity": 6.9142, "curve": curve}
    return ComparisonRow(
        name=name, forget_accuracy=end, utility=kept, utility_at_forget=at, **{**values, **changes}
    )


def comparison() -> Comparison:
    unknown = dict.fromkeys(("overlap_top1", "kl", "trainable_fraction", "steps", "seconds"))
    rows = [
        _variant("original", 0.9325, 0.9152, None, curve=[], **unknown),
        _variant("SEUF", 0.3125, 0.8931, 0.9013),
        _variant("without anchor", 0.2975, 0.7312, 0.8127, overlap_top1=0.6113, kl=0.8231),
        _variant("random expert", 0.8525, 0.8711, None),
        _variant(
            "all parameters",
            0.2525,
            0.4127,
            0.6213,
            trainable_fraction=1.0,
            perplexity=math.inf,
            seconds=193.4,
        ),
    ]
    return Comparison(**COMMON, forget=["embedded:chemistry"], rows=rows)


def job() -> dict[str, Any]:
    return {
        "algorithm": {"name": "npo", "beta": 0.1},
        "anchor": {"name": "kl", "weight": 1.0, "layers": "targets"},
    }
