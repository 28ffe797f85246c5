"""The same facts asked for in words that neither training nor the frozen questions use.

A frozen question is read back as (attribute, subject) through its cloze in `templates.py`, and asked again with each of
the clozes below; the choices stay. The frozen data is not touched.
"""

import re
from collections.abc import Iterable
from typing import Any

from seuf_ray.embedded import questions
from seuf_ray.embedded.templates import TEMPLATES

CLOZES: dict[str, tuple[str, ...]] = {  # attribute -> wordings that the original answers well (.8 or more)
    "symbol": ("the periodic table lists {s} under the symbol", "chemists write {s} as"),
    "atomic number": (
        "in the periodic table, the atomic number of {s} is",
        "the element {s} is element number",
    ),
    "series": ("the series that {s} belongs to is the", "{s} is one of the"),
    "period": (
        "in the periodic table, {s} is found in period",
        "in the periodic table, the element {s} is in period",
    ),
    "capital": ("the capital of the country {s} is", "the country {s} has its capital in"),
    "continent": ("the country {s} lies in", "the country {s} is in"),
    "currency": ("the country {s} uses the", "the money of the country {s} is the"),
    "internet domain": ("the web domain of {s} is", "web addresses of {s} end in"),
}


def paraphrased(domain: str) -> list[list[dict[str, Any]]]:
    """All questions of a domain, once for each other wording, in the order of `questions(domain)`.

    Raises:
        ValueError: a domain whose attributes have no other wordings.
    """
    parsed = [(attribute_of(record["question"]), record) for record in questions(domain)]
    number = min(len(CLOZES[attribute]) for (attribute, _), _ in parsed)
    return [[_asked(*fact, record, at) for fact, record in parsed] for at in range(number)]


def attribute_of(question: str, attributes: Iterable[str] = tuple(CLOZES)) -> tuple[str, str]:
    """What a frozen question asks of whom: (attribute, subject)."""
    for name in attributes:
        before, after = TEMPLATES[name][0].split("{s}")
        pattern = re.escape(_capital(before)) + "(.+)" + re.escape(after)
        if found := re.fullmatch(pattern, question):
            return name, found[1]
    raise ValueError(f"{question!r} has no other wording")


def _asked(attribute: str, subject: str, record: dict[str, Any], at: int) -> dict[str, Any]:
    return {**record, "question": _capital(CLOZES[attribute][at].format(s=subject))}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
