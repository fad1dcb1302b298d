"""A page, its tables and figures.

Everything is in the file: no font, style, script or image is loaded, and the page's policy forbids
it. Colours follow the reader's choice of light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; --surface: #fcfcfb; --text: #1d1d1b; --muted: #5f5e5a;
  --line: #dddcd6; --series: #2a6fc9; --chosen: #2a6fc926; --edge: #c2521b; --row: #f3f2ee; }
@media (prefers-color-scheme: dark) { :root { --surface: #1a1a19; --text: #ecebe6;
  --muted: #a5a49d; --line: #3a3a37; --series: #6aa5f2; --chosen: #6aa5f230; --edge: #f08a55;
  --row: #242422; } }
body { background: var(--surface); color: var(--text); margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, figcaption { color: var(--muted); max-width: 60rem; }
figure { margin: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th.text, td.text { text-align: left; overflow-wrap: anywhere; }
tbody tr:hover { background: var(--row); }
thead th { position: sticky; top: 0; background: var(--surface); vertical-align: bottom; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--series); }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--muted); font: 11px system-ui, sans-serif; }
svg .axis { stroke: var(--line); fill: none; } svg .series { fill: var(--series); }
svg .path { stroke: var(--series); fill: none; stroke-width: 1.5; }
svg .chosen { fill: var(--chosen); } svg .edge { stroke: var(--edge); stroke-width: 1.5; }
svg .hit:hover { stroke: var(--text); stroke-width: 2; }
"""

# A click on a heading sorts by it: numbers from the least, again from the greatest; rows without a
# value are last either way.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const heading = button.parentElement;
      const down = heading.getAttribute("aria-sort") === "ascending";
      const value = row => row.cells[column].dataset.sort;
      const numeric = heading.dataset.kind === "number";
      const order = (a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        return (down ? -1 : 1) * (numeric ? x - y : x.localeCompare(y));
      };
      body.append(...[...body.rows].sort(order));
      table.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}
"""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        html: what it shows, escaped already.
        sort: what it is sorted by: a number, or a text; None is last.
    """

    html: str
    sort: float | str | None = None


def number(value: float, digits: int = 2) -> Cell:
    """A cell with a number; a dash for NaN."""
    if math.isnan(value):
        return Cell("&ndash;")
    if math.isinf(value):
        return Cell("&infin;" if value > 0 else "&minus;&infin;", math.copysign(1e300, value))
    return Cell(f"{value:,.{digits}f}", value)


def table(headings: Sequence[str], rows: Sequence[Sequence[Cell | str]]) -> str:
    """A table that a click on a heading sorts; a column of texts is aligned to the left.

    Args:
        headings: plain texts.
        rows: cells, or plain texts, as many in each row as there are headings.
    """
    cells = [[_text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    texts = [any(isinstance(row[i].sort, str) for row in cells) for i in range(len(headings))]
    lines = ['<div class="scroll"><table><thead><tr>']
    for heading, is_text in zip(headings, texts):
        kind = ' class="text" data-kind="text"' if is_text else ' data-kind="number"'
        lines.append(f"<th{kind}><button>{escape(heading)}</button></th>")
    lines.append("</tr></thead><tbody>")
    for row in cells:
        lines.append("<tr>")
        for cell, is_text in zip(row, texts):
            kind = ' class="text"' if is_text else ""
            sort = "" if cell.sort is None else escape(str(cell.sort))
            lines.append(f'<td{kind} data-sort="{sort}">{cell.html}</td>')
        lines.append("</tr>")
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _text(text: str) -> Cell:
    return Cell(escape(text), text)


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def figure(heading: str, svg: str, caption: str = "") -> str:
    """A plot under a heading, with plain text below it."""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<h2>{escape(heading)}</h2><figure>{svg}{note}</figure>"


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        parts: what ``paragraph``, ``table`` and ``figure`` gave.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            f"<script>{_SCRIPT}</script></body></html>\n",
        ]
    )
