"""An ablation as one HTML file: tables that can be sorted, figures, the file that was asked for; nothing is loaded."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

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


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], baseline: str | None) -> str:
    """A table whose heads sort it; the baseline's rows are marked."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = [
        ('<tr class="baseline">' if row[0] == baseline else "<tr>")
        + "".join(f"<td>{escape(shown(cell))}</td>" for cell in row)
        + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def picture(title: str, path: Path) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def page(
    content: Mapping[str, Any],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]],
    notes: Sequence[str],
    figures: Mapping[str, Path],
) -> str:
    """The HTML of an ablation's results: ``tables`` (heads and rows) and ``figures`` (PNG files) by title."""
    ablation = content["ablation"]
    arms, *others = [
        f"<h2>{escape(title)}</h2>{table(*parts, ablation['baseline'])}" for title, parts in tables.items()
    ]
    asked = yaml.safe_dump(dict(ablation), sort_keys=False, allow_unicode=True)
    name = escape(ablation["name"])
    about = "".join(f"<p>{escape(text)}</p>" for text in ([ablation["about"]] if ablation["about"] else []))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head><body>
<h1>{name}</h1>
{about}
{arms}
{"".join(f"<p>{escape(text)}</p>" for text in notes)}
{"".join(picture(title, path) for title, path in figures.items())}
{"".join(others)}
<h2>Asked for</h2>
<pre>{escape(content.get("command", ""))}</pre>
<pre>{escape(asked)}</pre>
<p>Click on a head to sort by its column.</p>
<script>{SCRIPT}</script>
</body></html>
"""
