"""A report as one page: tables and a roofline, with nothing to load and nothing to run."""

from html import escape
from math import log10
from typing import Any

from .report import kernel_text, scaled
from .sizes import written

WIDTH, HEIGHT, LEFT, BOTTOM = 900, 520, 70, 50
COLOURS = ("#1b6ca8", "#c0392b", "#27884a", "#8e5ea2", "#b9770e", "#16817a", "#7f5539", "#5d6d7e", "#a23b72", "#3d5a80")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .7em; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, td:nth-child(2), th { text-align: left }
pre { background: #f6f6f6; padding: .6em; white-space: pre-wrap; font-size: 13px }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50% } text { font: 12px system-ui, sans-serif }
"""


class Axes:
    """Logarithmic axes: arithmetic intensity in FLOP/B to the right, FLOP/s upwards."""

    def __init__(self, low: tuple[float, float], high: tuple[float, float]) -> None:
        self.low = [log10(x) for x in low]
        self.high = [log10(x) for x in high]

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (log10(value) - self.low[0]) / (self.high[0] - self.low[0]) * (WIDTH - LEFT - 20)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return HEIGHT - BOTTOM - (log10(value) - self.low[1]) / (self.high[1] - self.low[1]) * (HEIGHT - BOTTOM - 20)

    def line(self, a: tuple[float, float], b: tuple[float, float], style: str) -> str:
        """A line between two points."""
        ends = f'x1="{self.x(a[0]):.1f}" y1="{self.y(a[1]):.1f}" x2="{self.x(b[0]):.1f}" y2="{self.y(b[1]):.1f}"'
        return f"<line {ends} {style}/>"

    def text(self, at: tuple[float, float], words: str, more: str = "") -> str:
        """Words beside a point."""
        return f'<text x="{self.x(at[0]) + 4:.1f}" y="{self.y(at[1]) - 5:.1f}" {more}>{escape(words)}</text>'


def _points(report: dict[str, Any]) -> list[tuple[int, str, float, bool]]:
    """Number of the row, what it is, intensity, whether it is the actual one."""
    found = []
    for i, row in enumerate(report["rows"]):
        for name in ("forward", "backward"):
            told = f"{i + 1} {row['workload']} {name}"
            found.append((i, told, row[name]["intensity"], False))
            if row[name]["actual_intensity"]:
                found.append((i, told, row[name]["actual_intensity"], True))
    return found


def roofline(report: dict[str, Any]) -> str:
    """The plot: full dots at ideal intensity on the roof, rings at the intensity of what the launches move."""
    gpu, points = report["gpu"], _points(report)
    peak, bandwidth = gpu["peak_used"], gpu["bandwidth_used"]
    vector = min(gpu["vector"], peak)
    least = min([x for *_, x, _ in points] + [1.0]) / 2
    most = max([x for *_, x, _ in points] + [peak / bandwidth]) * 3
    axes = Axes((least, bandwidth * least / 2), (most, peak * 2))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="roofline">']
    grey, dark = 'stroke="#ddd"', 'stroke="#333" stroke-width="2"'
    for decade in range(int(axes.low[0] // 1) + 1, int(axes.high[0] // 1) + 1):
        parts.append(axes.line((10.0**decade, 10 ** axes.low[1]), (10.0**decade, 10 ** axes.high[1]), grey))
        parts.append(axes.text((10.0**decade, 10 ** axes.low[1]), f"{10.0**decade:g}", 'dy="20"'))
    for decade in range(int(axes.low[1] // 1) + 1, int(axes.high[1] // 1) + 1):
        parts.append(axes.line((least, 10.0**decade), (most, 10.0**decade), grey))
        parts.append(f'<text x="2" y="{axes.y(10.0**decade) + 4:.1f}">{scaled(10.0**decade, "F/s")}</text>')
    parts.append(axes.line((least, bandwidth * least), (peak / bandwidth, peak), dark))
    parts.append(axes.line((peak / bandwidth, peak), (most, peak), dark))
    parts.append(axes.line((vector / bandwidth, vector), (most, vector), 'stroke="#999" stroke-dasharray="5 4"'))
    parts.append(axes.text((peak / bandwidth, peak), f"{scaled(peak, 'FLOP/s')} matrix"))
    parts.append(axes.text((peak / bandwidth, vector), f"{scaled(vector, 'FLOP/s')} without matrix units"))
    parts.append(axes.text((least, bandwidth * least), f"{scaled(bandwidth, 'B/s')}", 'dy="-20"'))
    for i, told, x, actual in points:
        y, colour = min(peak, bandwidth * x), COLOURS[i % len(COLOURS)]
        fill = f'fill="white" stroke="{colour}" stroke-width="2"' if actual else f'fill="{colour}"'
        what = f"{told}: {x:.1f} FLOP/B{', as launched' if actual else ''}, at most {scaled(y, 'FLOP/s')}"
        dot = f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="5" {fill}><title>{escape(what)}</title></circle>'
        parts += [dot, axes.text((x, y), str(i + 1)) if not actual else ""]
    middle = f'x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle"'
    return "\n".join([*parts, f"<text {middle}>arithmetic intensity, FLOP/B</text>", "</svg>"])


def _table(report: dict[str, Any]) -> str:
    """One line per workload and pass."""
    head = ("", "workload", "", "FLOP", "ideal", "actual", "FLOP/B", "floor", "bound", "path")
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for i, row in enumerate(report["rows"]):
        for name in ("forward", "backward"):
            one = row[name]
            colour = COLOURS[i % len(COLOURS)]
            cells = (
                f'<span class="dot" style="background:{colour}"></span> {i + 1}',
                escape(f"{row['workload']} {written(row['sizes'])}"),
                name,
                scaled(one["flops"], ""),
                scaled(one["ideal_bytes"], "B"),
                scaled(one["actual_bytes"], "B"),
                f"{one['intensity']:.1f}",
                scaled(one["floor_seconds"], "s"),
                one["bound"],
                row["path"],
            )
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    gpu = report["gpu"]
    title = f"Palimpsest kernels on {gpu['name']}, {report['dtype']}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>',
        f"<h1>{escape(title)}</h1>",
        f"<p>Nothing here is measured. Floors are what the peaks allow ({scaled(gpu['peak_used'], 'FLOP/s')}, "
        f"{scaled(gpu['bandwidth_used'], 'B/s')}); the rest is read off code compiled by Triton {report['triton']}. "
        "A full dot stands at an operation's ideal intensity, inputs and outputs moved once; a ring at that of all the "
        "tensors its launches are given.</p>",
        roofline(report),
        _table(report),
    ]
    for i, row in enumerate(report["rows"]):
        parts.append(f"<h2>{i + 1} {escape(row['workload'])}</h2>")
        if row["reason"]:
            parts.append(f"<p>No Triton path, runs chunked torch: {escape(row['reason'])}</p>")
        for name in ("forward", "backward"):
            lines = [line for kernel in row[name]["kernels"] for line in kernel_text(kernel)]
            if lines:
                parts.append(f"<h3>{name}</h3><pre>{escape(chr(10).join(lines))}</pre>")
    return "\n".join([*parts, "</html>"]) + "\n"
