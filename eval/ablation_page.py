"""An ablation as one HTML file: tables that can be sorted, figures, the file that was asked for; nothing is loaded."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ..train.page import document, table


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
    about = "".join(f"<p>{escape(text)}</p>" for text in ([ablation["about"]] if ablation["about"] else []))
    body = f"""{about}
{arms}
{"".join(f"<p>{escape(text)}</p>" for text in notes)}
{"".join(picture(title, path) for title, path in figures.items())}
{"".join(others)}
<h2>Asked for</h2>
<pre>{escape(content.get("command", ""))}</pre>
<pre>{escape(asked)}</pre>
<p>Click on a head to sort by its column.</p>"""
    return document(ablation["name"], body)
