"""The page shows the artifacts' numbers, is whole HTML, needs nothing from elsewhere, and survives hostile names."""

from __future__ import annotations

import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from records import MODEL, attribution, comparison, evaluation, job, metrics, plan

from seuf_ray.report import charts, console_table, write_attribution_page, write_report

# -- reading the page --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are balanced, and collects table rows and attributes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")
        ]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name: str, nth: int = 0) -> list[str]:
        return [row for row in self.rows if row[0].strip() == name][nth][1:]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    before, after = evaluation(0.9325, 0.91, 0.0), evaluation(0.3125, 0.89, 0.12)
    assert write_report(path, attribution(), plan(), metrics(), before, after, comparison(), job()) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_needs_nothing_from_elsewhere(page: Page, text: str) -> None:
    assert not page.links and not {"script", "link", "img", "iframe"} & page.tags
    assert not re.search(r"https?:|url\(|@import", text)
    assert 'name="viewport"' in text and "prefers-color-scheme" in text


def test_before_and_after_are_the_artifacts(page: Page) -> None:
    before, after = evaluation(0.9325, 0.91, 0.0), evaluation(0.3125, 0.89, 0.12)
    for name in before.utility:
        first, last = before.utility[name], after.utility[name]
        signed = f"{last.mean - first.mean:+.3f}".replace("-", "−")
        assert page.row(name) == [f"{first.mean:.3f}", f"{last.mean:.3f}", signed, "300"]
    assert page.row("embedded:chemistry")[:2] == [
        f"{before.forget_accuracy:.3f}",
        f"{after.forget_accuracy:.3f}",
    ]
    assert page.row("utility")[:2] == [f"{before.utility_accuracy:.3f}", f"{after.utility_accuracy:.3f}"]
    assert page.row("perplexity")[:2] == [f"{before.perplexity:#.4g}", f"{after.perplexity:#.4g}"]
    assert page.row("perplexity")[3] == "9,000"
    assert page.row("first choice kept, forget tokens")[1] == f"{after.drift('overlap_top1', 'forget'):.3f}"
    assert page.row("KL to the original routing, retain tokens")[1] == f"{after.drift('kl', 'retain'):#.4g}"


def test_headline_figures(text: str) -> None:
    after = evaluation(0.3125, 0.89, 0.12)
    assert f'<div class="big">{after.forget_accuracy:.3f}</div>' in text
    assert f'<div class="big">{after.utility_accuracy:.3f}</div>' in text
    assert '<div class="big">0.352 %</div>' in text and "14,848 parameters" in text
    assert "Only expert 5 of layer 3 and 1 router trained: 0.352 % of the model." in text
    assert "npo (beta 0.1)" in text and "kl (weight 1.0, layers targets)" in text
    assert "The best expert leads by less than 5 %." in text


def test_every_layer_after_training(page: Page) -> None:
    after = evaluation(0.3125, 0.89, 0.12)
    expected = [
        f"{getattr(after, name)[data][3].mean:{'#.4g' if name == 'kl' else '.3f'}}"
        for data in ("forget", "retain")
        for name in ("overlap_top1", "overlap_topk", "kl")
    ]
    assert expected in [row[1:] for row in page.rows if row[0] == "3"]


def test_strongest_experts(page: Page) -> None:
    ranked = attribution().ranked()
    rows = [row for row in page.rows if len(row) > 1 and re.match(r"layer \d+, expert", row[1])]
    assert len(rows) == 10
    for (value, (layer, expert)), (following, _), row in zip(ranked, ranked[1:], rows, strict=False):
        assert row[1].startswith(f"layer {layer}, expert {expert}")
        (found,) = [one for one in attribution().layers if one.layer == layer]
        assert found.retain is not None
        shown = (value, found.retain.affinity[expert], value - following)
        assert row[2:5] == [f"{number:#.4g}" for number in shown]
        assert row[5].startswith(f"{found.stability[expert] * 100:.0f}")
    assert "trained" in rows[0][1] and all("trained" not in row[1] for row in rows[1:])


def test_comparison_is_the_artifact(page: Page) -> None:
    for row in comparison().rows[1:]:
        shown = page.row(row.name)
        assert shown[:2] == [f"{row.forget_accuracy:.3f}", f"{row.utility:.3f}"]
        assert shown[2] == ("∞" if math.isinf(row.perplexity) else f"{row.perplexity:.4g}")
        assert shown[3:5] == [f"{row.overlap_top1:.3f}", f"{row.kl:.4g}"]
        assert shown[5:] == [f"{100 * (row.trainable_fraction or 0):.3g} %", "60", f"{row.seconds:.4g}"]
    assert page.row("original") == ["0.932", "0.915", "6.914", "–", "–", "–", "–", "–"]
    assert page.row("SEUF", 1) == ["0.915", "0.901", "−0.014"]
    assert page.row("random expert", 1) == ["0.915", "not reached", "–"]


def test_console_table() -> None:
    lines = console_table(comparison()).splitlines()
    assert any(
        re.match(r"SEUF +0\.312 +0\.893 +6\.914 +0\.937 +0\.01231 +0\.352 % +60 +41\.27$", line)
        for line in lines
    )
    assert any(re.match(r"without anchor +0\.813$", line) for line in lines)
    table = lines[lines.index("After training:") + 1 :][:7]
    assert len({len(line) for line in table}) == 1  # aligned


def test_provenance(text: str) -> None:
    for record in (attribution(), plan(), evaluation(0.9325, 0.91, 0.0), comparison()):
        assert record.fingerprint in text
    assert "2.13.0" in text and MODEL.fingerprint in text


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>\"'&"
    report = attribution(source=evil)
    report = report.model_copy(update={"warnings": [evil], "model": MODEL.model_copy(update={"name": evil})})
    measured = evaluation(0.5, 0.5, 0.1, source=evil)
    rows = [row.model_copy(update={"name": evil}) for row in comparison().rows]
    compared = comparison().model_copy(update={"rows": rows})
    curves = [{**record, f"loss/{evil}": 1.0} for record in metrics()]
    settings = {"algorithm": {"name": evil}, "anchor": evil}
    path = write_report(tmp_path / "r.html", report, plan(), curves, measured, measured, compared, settings)
    text = path.read_text()
    assert "<script" not in text and "script" not in Page(text).tags
    assert text.count("&lt;script&gt;") > 10


def test_tokens_on_target_experts_are_drawn_where_they_were_recorded(tmp_path: Path, text: str) -> None:
    told = [
        {"step": step, "step/target_tokens/3": 0.25, "step/target_tokens_ref/3": 0.125} for step in (10, 20)
    ]
    after, title = evaluation(0.3, 0.9, 0.1), "Training tokens on target experts"
    path = write_report(tmp_path / "r.html", attribution(), plan(), [*metrics(), *told], after, after)
    found = path.read_text()
    assert title in found and title not in text
    assert "layer 3, original router: 0.125" in found and "layer 3: 0.25" in found


def test_a_run_that_recorded_nothing(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"overlap_top1": {}, "overlap_topk": {}, "kl": {}, "utility": {}}
    before = evaluation(0.9, 0.9, 0.0).model_copy(update=empty)
    full = plan(scope="full", experts=[], routers=[], tensors=[], trainable_fraction=1.0)
    path = write_report(tmp_path / "r.html", attribution(), full, [], before, before)
    text = path.read_text()
    assert Page(text).row("utility") == ["–", "–", "–", "–"]
    assert "Every parameter trained (100 % of the model)." in text and "nothing was recorded" in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).lower().replace(
        "provenance", ""
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_charts_leave_out_what_is_not_finite(value: float) -> None:
    line = charts.Line("x", [(0, 1.0), (1, value), (2, 3.0)], "red")
    drawn = charts.line_chart([line], charts.Axes())
    assert drawn.count("<circle") == 2 and not re.search(r"\bnan\b|\binf\b", drawn)
    alone = charts.Line("x", [(0, value)], "red")
    assert "nothing was recorded" in charts.line_chart([alone], charts.Axes())
    assert "nan" not in charts.heat_map([(0, [0.5, value])], [], "score").replace("score nan", "")


def test_a_constant_curve_has_an_axis() -> None:
    for constant in (0.0, 1.0, -3e9, 1e-12):
        drawn = charts.line_chart([charts.Line("x", [(1, constant)], "red")], charts.Axes())
        assert "<circle" in drawn and "<text" in drawn


def test_ticks_are_round() -> None:
    assert charts.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert charts.ticks(-3.1, 7.9) == [0, 5]
    assert charts.ticks(0.9, 1.0) == [0.9, 0.925, 0.95, 0.975, 1.0]


def test_a_large_model(tmp_path: Path) -> None:
    """60 layers of 256 experts, as DeepSeek-V3 has: quick, every expert has its tooltip, and a browser can take it."""
    report = attribution(layers=60, experts=256)
    measured = evaluation(0.5, 0.5, 0.1)
    start = time.perf_counter()
    path = write_report(
        tmp_path / "r.html", report, plan(experts=[(3, 5), (40, 255)]), metrics(), measured, measured
    )
    assert time.perf_counter() - start < 2
    text = path.read_text()
    assert text.count(": affinity ") == 60 * 256
    assert text.count('class="target"') == 2 * 2  # on forget text and on retain text
    assert len(text) < 4_000_000


def test_an_early_end_is_told_with_the_step_that_was_kept(tmp_path: Path) -> None:
    after = evaluation(0.2, 0.9, 0.1)
    ended: list[dict[str, Any]] = [*metrics()]
    ended[-1] = {**ended[-1], "stopped": "guards.max_kl = 0.5 violated <here>", "kept": 4}
    text = write_report(tmp_path / "r.html", attribution(), plan(), ended, after, after).read_text()
    Page(text)
    assert "guards.max_kl = 0.5 violated &lt;here&gt;. The patch holds the tensors of step 4." in text
    whole = write_report(tmp_path / "w.html", attribution(), plan(), metrics(), after, after).read_text()
    assert "Training ended early" not in whole


def test_the_page_of_an_attribution_says_what_was_left_out_and_what_was_compared(tmp_path: Path) -> None:
    report = attribution()
    bad = report.data.model_copy(update={"first_bad": "x.jsonl:17: not <JSON>"})
    report = report.model_copy(update={"data": bad, "retain": report.data, "score": "contrast"})
    text = write_attribution_page(tmp_path / "attribution.html", report).read_text()
    assert "1,200 in 1,210 rows, 2 malformed, the first x.jsonl:17: not &lt;JSON&gt;" in text
    assert "retain texts" in text and report.warnings[0].replace("'", "&#x27;") in text
    heads = Page(text).rows[0]
    assert heads[2:5] == ["contrast", "affinity on retain text", "margin to the next"]
