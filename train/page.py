"""What the pages share: one HTML file each, that loads nothing; their look, and tables that can be sorted."""

from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font: 13px/1.4 ui-monospace, monospace; margin: .5em 0 }
.wide { overflow-x: auto } th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } th { cursor: pointer; background: #f4f4f4; white-space: nowrap }
th[aria-sort=ascending]::after { content: " ↑" } th[aria-sort=descending]::after { content: " ↓" }
tr.baseline td { background: #faf6e8 } img { max-width: 100% } pre { background: #f6f6f6; padding: 1em; overflow: auto }
"""

SCRIPT = """
const value = text => { const x = parseFloat(text.replace(/,/g, "")); return Number.isNaN(x) ? text : x; };
document.querySelectorAll("th").forEach(head => { head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  head.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  [...body.rows].sort((a, b) => {
    const x = value(a.cells[column].textContent), y = value(b.cells[column].textContent);
    const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
    return up ? order : -order;
  }).forEach(row => body.append(row));
}; });
"""


def shown(cell: Any) -> str:
    """A cell's text: numbers short, and a dash for what is not there."""
    if cell is None:
        return "–"
    return f"{cell:.5g}" if isinstance(cell, float) else str(cell)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], baseline: str | None = None, kind: str = "wide") -> str:
    """A table whose heads sort it; the rows that begin with ``baseline`` are marked."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = [
        ('<tr class="baseline">' if row[0] == baseline and baseline is not None else "<tr>")
        + "".join(f"<td>{escape(shown(cell))}</td>" for cell in row)
        + "</tr>"
        for row in rows
    ]
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The whole file: ``body`` below the title, with the common look and further ``style`` and ``script``."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>
<h1>{escape(title)}</h1>
{body}
<script>{SCRIPT}{script}</script>
</body></html>
"""
