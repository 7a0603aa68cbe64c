"""The page of :mod:`.report`: curves, throughput, what happened, configurations, in one file that loads nothing."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from .page import document, table
from .report_curves import Panel, figure

STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1.2em 1.6em }
figure { margin: 0; position: relative } svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: #555 } .grid { stroke: #e4e4e4 }
.mark { stroke-width: 1.2; stroke-dasharray: 2 3 } .at { stroke: #999 }
figcaption { font-size: 13px; min-height: 2.9em } figcaption b { font-size: 14px; margin-right: .6em }
.key { border-bottom: 2px solid; margin-right: .8em; white-space: nowrap } .key.dashed { border-bottom-style: dashed }
output { color: #555; font: 12px ui-monospace, monospace; display: block }
h2 { font-size: 18px; margin: 1.4em 0 .3em } .curves { margin-top: 1.6em }
.events td { text-align: left } .events { max-height: 26em } .wide.events { overflow-y: auto }
details { margin: .6em 0 } summary { cursor: pointer }
"""

SCRIPT = """
document.querySelectorAll("figure").forEach(figure => {
  const told = JSON.parse(figure.dataset.told), svg = figure.querySelector("svg"), out = figure.querySelector("output");
  const at = svg.querySelector(".at"), wide = svg.viewBox.baseVal.width;
  const clear = () => { out.textContent = ""; at.setAttribute("y2", 0); };
  svg.onmouseleave = clear;
  svg.onmousemove = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * wide;
    const step = told.left + (x - told.x0) / (told.x1 - told.x0) * (told.right - told.left);
    if (step < told.left || step > told.right) return clear();
    let near = null;
    const words = told.lines.map(line => {
      const found = line.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
      if (near === null || Math.abs(found[0] - step) < Math.abs(near - step)) near = found[0];
      return `${line.label} ${found[1]}`;
    });
    out.textContent = `step ${near}: ` + words.join("  ");
    const place = told.x0 + (near - told.left) / (told.right - told.left) * (told.x1 - told.x0);
    for (const [name, value] of [["x1", place], ["x2", place], ["y1", told.y0], ["y2", told.y1]])
      at.setAttribute(name, value);
  };
});
"""


def page(
    title: str,
    summaries: Sequence[Mapping[str, Any]],
    panels: Sequence[Panel],
    events: Mapping[str, Sequence[Mapping[str, str]]],
    configs: Mapping[str, Mapping[str, Any]],
    differing: Mapping[str, Sequence[str]],
) -> str:
    """The HTML.

    Args:
        summaries: of each run its numbers by what they are, the same keys in all.
        events: of each run its events as they are shown.
        configs: of each run its configuration.
        differing: of each run but the first where its configuration differs from the first one's.
    """
    body = [_numbers(summaries), f'<div class="curves">{"".join(figure(panel) for panel in panels)}</div>']
    if not panels:
        body.append("<p>No line is in metrics.jsonl yet.</p>")
    several = len(configs) > 1
    for name, changes in differing.items():
        rows = [(key, *values.split(" -> ", 1)) for key, values in (line.split(": ", 1) for line in changes)]
        first = next(iter(configs))
        words = table(("key", first, name), rows) if rows else "<p>The configurations are the same.</p>"
        body.append(f"<h2>Where {escape(name)} differs from {escape(first)}</h2>{words}")
    for name, told in events.items():
        of = f" of {escape(name)}" if several else ""
        lines = [[event[key] for key in ("time", "step", "kind", "detail")] for event in told]
        heads = ("time, UTC", "step", "event", "")
        words = table(heads, lines, kind="wide events") if lines else "<p>None recorded.</p>"
        body.append(f"<h2>Events{of}</h2>{words}")
    for name, config in configs.items():
        of = f" of {escape(name)}" if several else ""
        shown = escape(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        opened = "" if several else " open"
        body.append(f"<details{opened}><summary><b>Configuration{of}</b></summary><pre>{shown}</pre></details>")
    return document(title, "\n".join(body), style=STYLE, script=SCRIPT)


def _numbers(summaries: Sequence[Mapping[str, Any]]) -> str:
    """One row for each number, one column for each run."""
    first = summaries[0]
    rows = [(key, *(told[key] for told in summaries)) for key in first if key != "run"]
    return table(("", *(told["run"] for told in summaries)), rows)
