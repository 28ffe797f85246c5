"""The frozen embedded data: well formed, learned by both checkpoints, small, and what `build.py` makes."""

import gzip
import importlib.metadata
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from seuf_ray import embedded
from seuf_ray.embedded import build, wordnet

MEGABYTE = 1_000_000


def test_all_package_data_stay_small() -> None:
    files = [
        path for path in embedded.FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) <= 14 * MEGABYTE


def test_the_loader_imports_no_heavy_package() -> None:
    code = "import sys, seuf_ray.embedded as e; e.texts('nature'); print({'torch', 'transformers'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("name", [*embedded.DOMAINS, embedded.GENERAL])
def test_texts_are_distinct_sentences(name: str) -> None:
    lines = embedded.texts(name)
    assert len(lines) >= 2_000
    assert all(line == line.strip() and line.endswith(".") for line in lines)
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("name", embedded.DOMAINS)
def test_questions_are_well_formed_and_balanced(name: str) -> None:
    records = embedded.questions(name)
    assert len(records) >= 400
    for record in records:
        assert set(record) == {"question", "choices", "answer"}
        assert len(set(record["choices"])) == len(record["choices"]) == 4
        assert all(choice == choice.strip() and choice for choice in record["choices"])
        assert record["question"] == record["question"].strip()
    positions = Counter(record["answer"] for record in records)
    assert set(positions) == {0, 1, 2, 3}
    assert min(positions.values()) >= 0.19 * len(records)


@pytest.mark.parametrize("name", embedded.DOMAINS)
def test_held_out_clozes_do_not_occur_in_the_training_texts(name: str) -> None:
    everything = "\n".join(
        line for source in (*embedded.DOMAINS, embedded.GENERAL) for line in embedded.texts(source)
    ).lower()
    assert not [record for record in embedded.questions(name) if record["question"].lower() in everything]


@pytest.mark.parametrize(
    ("call", "name", "allowed"),
    [
        (embedded.texts, "alchemy", "general"),
        (embedded.questions, "general", "chemistry, geography, languages, computing, nature"),
        (embedded.checkpoint, "general", "specialised, unspecialised"),
    ],
)
def test_an_unknown_name_is_refused_with_the_allowed_ones(call, name: str, allowed: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=allowed):
        call(name)


def test_compression_is_deterministic() -> None:
    records = ["an é", {"answer": 1}]
    assert build.jsonl_gz(records) == build.jsonl_gz(records)
    assert [json.loads(line) for line in gzip.decompress(build.jsonl_gz(records)).splitlines()] == records


def test_building_again_gives_the_frozen_data() -> None:
    for package, version in build.SOURCES.items():
        if not _installed(package, version):
            pytest.skip(f"{package} {version} is not installed")
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux" or not wordnet.FOLDER.exists():
        pytest.skip("Python 3.11 on Linux and WordNet made the frozen data")
    for file, records in build.collect().items():
        assert gzip.decompress((embedded.FOLDER / "data" / file).read_bytes()) == gzip.decompress(
            build.jsonl_gz(records)
        ), file


def _installed(package: str, version: str) -> bool:
    try:
        return importlib.metadata.version(package) == version
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("name", embedded.CHECKPOINTS)
def test_a_checkpoint_is_a_plain_hub_folder(name: str) -> None:
    from safetensors import safe_open

    folder = embedded.checkpoint(name)
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["num_experts"], settings["num_experts_per_tok"]) == (32, 4)
    assert not settings.get("output_router_logits")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(tensor).get_dtype() for tensor in names} == {"BF16"}
    assert "model.layers.3.mlp.experts.31.down_proj.weight" in names
    assert "lm_head.weight" not in names  # tied


@pytest.mark.parametrize("name", embedded.CHECKPOINTS)
def test_a_checkpoint_knows_every_domain(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = embedded.checkpoint(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for domain in embedded.DOMAINS:
        records = embedded.questions(domain)
        records = records[:: len(records) // 40][:40]
        assert _accuracy(model, tokenizer, records) >= 0.8, domain


def _accuracy(model, tokenizer, records) -> float:  # type: ignore[no-untyped-def]
    """Share of questions whose right choice has the highest summed log-probability."""
    import torch

    rows = [(record["question"], choice) for record in records for choice in record["choices"]]
    batch = tokenizer(
        [f"{question} {choice}" for question, choice in rows],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    with torch.no_grad():
        logps = (
            model(**batch).logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        )
    lengths = torch.tensor([len(tokenizer(question)["input_ids"]) for question, _ in rows])
    positions = torch.arange(1, batch["input_ids"].shape[1])
    counted = (positions >= lengths[:, None]) & batch["attention_mask"][:, 1:].bool()
    best = (logps * counted).sum(-1).view(-1, 4).argmax(-1).tolist()
    return sum(choice == record["answer"] for choice, record in zip(best, records, strict=True)) / len(
        records
    )


def test_notices_name_every_source() -> None:
    text = Path(embedded.FOLDER / "NOTICE.md").read_text()
    assert all(
        word in text
        for word in ("GeoNames", "CLDR", "mendeleev", "Python Software Foundation", "WordNet 3.0")
    )
