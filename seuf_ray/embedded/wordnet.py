"""Reads Princeton WordNet 3.0: kinds of animals and plants for the facts, examples and glosses for the general text.

Debian's package `wordnet-base` puts the files at `/usr/share/wordnet`; the manual page wndb(5WN) tells their format.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
LEXICOGRAPHER_FILE = {"animal": 5, "plant": 20}
CATEGORIES = {
    "animal": "bird fish insect snake lizard dog cat horse monkey whale butterfly spider beetle frog shark rodent "
    "mollusk crustacean dinosaur",
    "plant": "tree shrub herb grass fern vine flower cactus palm moss fungus orchid weed wildflower vegetable",
}
PER_CATEGORY = 18
GENERAL_LINES = 12_000
COMMON, VERY_COMMON = (
    25,
    400,
)  # occurrences in WordNet's glosses; a general line holds no word rarer than COMMON


@dataclass(frozen=True)
class Synset:
    """One noun sense: its words, its lexicographer file, and its hypernyms' offsets."""

    words: tuple[str, ...]
    file: int
    parents: tuple[int, ...]


@cache
def nouns() -> dict[int, Synset]:
    """Every noun synset, by offset."""
    return dict(_noun(line) for line in _lines("noun"))


def _lines(part: str) -> Iterator[str]:
    """The records of a data file; the licence header is indented."""
    with (FOLDER / f"data.{part}").open(encoding="utf-8") as file:
        yield from (line for line in file if not line.startswith("  "))


def _noun(line: str) -> tuple[int, Synset]:
    fields = line.split("|")[0].split()
    size = int(fields[3], 16)
    pointers = fields[5 + 2 * size :]
    parents = tuple(int(pointers[i + 1]) for i, symbol in enumerate(pointers[:-1]) if symbol in ("@", "@i"))
    return int(fields[0]), Synset(tuple(fields[4 : 4 + 2 * size : 2]), int(fields[1]), parents)


def kinds(realm: str) -> list[tuple[str, str]]:
    """Pairs such as `("beagle", "dog")`: unambiguous one-word names, at most `PER_CATEGORY` of each category."""
    categories = {_category(realm, word): word for word in CATEGORIES[realm].split()}
    senses = Counter(word.lower() for synset in nouns().values() for word in synset.words)
    found: dict[str, list[str]] = {word: [] for word in categories.values()}
    for synset in nouns().values():
        kind = _nearest(synset, categories)
        name = synset.words[0]
        if kind and senses[name] == 1 and re.fullmatch("[a-z]{4,10}", name) and kind not in name:
            found[kind].append(name)
    return [
        (name, kind) for kind, names in found.items() for name in sorted(names, key=shuffled)[:PER_CATEGORY]
    ]


def _category(realm: str, word: str) -> int:
    """The offset of a category's sense: the one with the most direct children in the realm's file."""
    children = Counter(parent for synset in nouns().values() for parent in synset.parents)
    offsets = [o for o, s in nouns().items() if word in s.words and s.file == LEXICOGRAPHER_FILE[realm]]
    return max(offsets, key=lambda offset: (children[offset], -offset))


def _nearest(synset: Synset, categories: dict[int, str]) -> str | None:
    """The nearest category above a synset, or None where there is none or two are equally near."""
    level = set(synset.parents)
    while level:
        hits = {categories[offset] for offset in level if offset in categories}
        if hits:
            return hits.pop() if len(hits) == 1 else None
        level = {parent for offset in level for parent in nouns()[offset].parents}
    return None


def shuffled(text: str) -> str:
    """A sort key that mixes well and is the same everywhere."""
    return hashlib.sha256(text.encode()).hexdigest()


def general(domain_words: set[str]) -> list[str]:
    """Example sentences and glosses of common words, none of which is a word of the domains."""
    lines = sorted({line for part in ("noun", "verb", "adj", "adv") for line in _glosses(part)})
    counts = Counter(word for line in lines for word in words(line))
    banned = {word for word in domain_words if counts[word] < VERY_COMMON}  # "not" may stay, "gold" may not
    fit = [line for line in lines if _common(words(line), counts, banned)]
    return [line[0].upper() + line[1:] + "." for line in sorted(fit, key=shuffled)[:GENERAL_LINES]]


def words(line: str) -> list[str]:
    """The lower-case words of a line."""
    return re.findall("[a-z]+", line.lower())


def _common(line: list[str], counts: Counter[str], banned: set[str]) -> bool:
    return (
        5 <= len(line) <= 12
        and min(counts[word] for word in line) >= COMMON
        and not banned.intersection(line)
    )


def _glosses(part: str) -> Iterator[str]:
    """The pieces of a gloss: definitions as they stand, examples without their quotes, plain ASCII letters only."""
    for line in _lines(part):
        for piece in re.split(r"; |\"", line.split("|", 1)[1]):
            text = piece.strip(" ;.\n")
            if re.fullmatch("[A-Za-z][A-Za-z ,'-]+[a-z]", text):
                yield text
