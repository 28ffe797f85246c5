"""The pieces of HTML that the report is made of, and how its numbers are written.

Text is escaped here and nowhere else: functions take plain strings and give HTML. A number's full precision is its
cell's tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

Format = Callable[[float], str]


def plain(value: float) -> str:
    """Four significant digits: scores, perplexity, KL, seconds."""
    return f"{value:#.4g}".rstrip(".")


def signed(value: float) -> str:
    """The difference of two such numbers."""
    return f"{value:+#.4g}".rstrip(".").replace("-", "−")


def accuracy(value: float) -> str:
    """Three decimals: accuracies and overlaps."""
    return f"{value:.3f}"


def change(value: float) -> str:
    """A difference of accuracies, with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def count(value: float) -> str:
    """A whole number with thousands set apart."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A share of something, two or three significant digits."""
    return f"{100 * value:.3g} %"


def written(value: float | None, form: Format) -> str:
    """`value` as `form` writes it; a dash for what is not known, and infinity as itself."""
    if value is None or math.isnan(value):
        return "–"
    return form(value) if math.isfinite(value) else "∞"


def number(value: float | None, form: Format = plain, best: bool = False) -> str:
    """A table cell with a number."""
    text = written(value, form)
    tip = "" if value is None or not math.isfinite(value) else f' title="{value!r}"'
    marked = f'<b class="best">{text}</b>' if best else text
    return f'<td class="n"{tip}>{marked}</td>'


def word(text: str, kind: str = "name", tag: str = "") -> str:
    """A table cell with text, and a marked word behind it."""
    marked = f' <span class="tag">{escape(tag)}</span>' if tag else ""
    return f'<td class="{kind}">{escape(text)}{marked}</td>'


def bar(share: float) -> str:
    """A table cell with a horizontal bar."""
    width = min(max(share, 0.0), 1.0) * 100 if math.isfinite(share) else 0.0
    return f'<td class="bar"><i style="width:{width:.1f}%"></i></td>'


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table that scrolls sideways where it must; rows are (class, cells), numeric columns are set to the right."""
    rows = list(rows)
    numeric = [cell.startswith('<td class="n"') for cell in rows[-1][1]] if rows else [False] * len(head)
    heads = "".join(
        f'<th class="n">{escape(text)}</th>' if right else f"<th>{escape(text)}</th>"
        for text, right in zip(head, numeric, strict=True)
    )
    body = "".join(f'<tr class="{kind}">{"".join(cells)}</tr>' for kind, cells in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(title: str, picture: str, entries: Sequence[tuple[str, str]] = (), caption: str = "") -> str:
    """A picture in a card, with a legend of (colour, words)."""
    items = "".join(f'<li><i style="color:{colour}"></i>{escape(text)}</li>' for colour, text in entries)
    legend = f'<ul class="legend">{items}</ul>' if items else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<figure>{heading}{legend}<div class="scroll">{picture}</div>{below}</figure>'


def tile(name: str, big: str, below: str, picture: str = "") -> str:
    """A headline figure."""
    return (
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="big">{escape(big)}</div>'
        f'<div class="from">{escape(below)}</div>{picture}</div>'
    )


def chips(pairs: Iterable[tuple[str, str]]) -> str:
    """Short facts side by side."""
    return f'<ul class="chips">{"".join(f"<li><b>{escape(a)}</b>{escape(b)}</li>" for a, b in pairs)}</ul>'


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def details(summary: str, content: str, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{escape(summary)}</summary>{content}</details>"


def section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def page(title: str, style: str, content: str) -> str:
    """A whole document that needs nothing but itself."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}\n</style>\n</head>\n"
        f"<body>\n<main>\n{content}\n</main>\n</body>\n</html>\n"
    )


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a terminal: columns padded, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(pairs)
        )
        for pairs in (list(zip(row, widths, strict=True)) for row in (head, *rows))
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
