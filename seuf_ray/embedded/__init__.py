"""The small real model and the facts that the demo and the tests use: two Qwen2-MoE checkpoints, five domains.

Everything here is frozen data; `build.py` is its provenance. Any domain can be the forget set: its `texts` are what to
unlearn and its `questions` measure what is left. The two checkpoints know the same facts; only `specialised` keeps each
domain to a few experts, which is the premise of SEUF and was trained in on purpose (see `training.py`).
"""

import gzip
import json
from pathlib import Path
from typing import Any

DOMAINS: tuple[str, ...] = ("chemistry", "geography", "languages", "computing", "nature")
GENERAL = "general"
CHECKPOINTS: tuple[str, ...] = ("specialised", "unspecialised")
FOLDER = Path(__file__).parent


def checkpoint(name: str = "specialised") -> Path:
    """A Hugging Face folder with the model and its tokenizer."""
    return FOLDER / _known("checkpoint", name, CHECKPOINTS)


def texts(name: str) -> list[str]:
    """The training sentences of a domain, or of the general text."""
    return [str(text) for text in _lines("texts", _known("texts", name, (*DOMAINS, GENERAL)))]


def questions(name: str) -> list[dict[str, Any]]:
    """The four-choice cloze questions of a domain: `question`, `choices`, and `answer`, the index of the right choice.

    A choice is scored as the continuation `" " + choice` of the question: the sum of its tokens' log-probabilities.
    """
    return [dict(record) for record in _lines("questions", _known("questions", name, DOMAINS))]


def _known(what: str, name: str, allowed: tuple[str, ...]) -> str:
    if name not in allowed:
        raise ValueError(f"no embedded {what} {name!r}: choose one of {', '.join(allowed)}")
    return name


def _lines(kind: str, name: str) -> list[Any]:
    with gzip.open(FOLDER / "data" / f"{name}.{kind}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
