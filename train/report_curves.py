"""Which curves of runs are drawn together, and one panel of them as SVG."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

COLOURS = ("#1b6ca8", "#c0392b", "#27884a", "#8e5ea2", "#b9770e", "#16817a", "#7f5539", "#5d6d7e")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 250, 58, 14, 10, 34
MOST = 400
"""Points of a line that are drawn; of more, the least and the greatest of each stretch."""
SMOOTH = 40
"""A line of noise is drawn faintly, and above it its mean over this part of it."""

Points = list[tuple[int, float]]

KEYS = {
    "loss": "loss, nats per token",
    "validation_loss": "loss, nats per token",
    "validation_bits_per_byte": "validation, bits per byte",
    "validation_accuracy": "validation accuracy",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "mfu": "share of the device's peak (MFU)",
    "peak_memory": "peak memory, GiB",
}
NOISY = ("loss", "grad_norm", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Line:
    """One curve: what it is called, whose it is, its points, whether it is as noisy as single batches are."""

    label: str
    colour: str
    points: Points
    noisy: bool = False
    dashed: bool = False


@dataclass
class Panel:
    """Curves over the steps in one pair of axes; ``marks``: steps where something happened, their colour, and what;
    ``span``: the first and last step of the axes, None: those of the curves."""

    title: str
    lines: list[Line] = field(default_factory=list)
    marks: list[tuple[int, str, str]] = field(default_factory=list)
    span: tuple[int, int] | None = None


def points_of(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) where the records have a number under a key."""
    scale = 2**-30 if key == "peak_memory" else 1.0
    found = [(record["step"], record.get(key)) for record in records]
    return [(step, scale * y) for step, y in found if isinstance(y, int | float) and math.isfinite(y)]


def panels(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[Panel]:
    """The panels of (name, records) of runs: what training and validation tell, then what memories do.

    Of one run a memory's number is a line for each layer, of several the mean over layers is a line for each run.
    """
    made: dict[str, Panel] = {}
    for number, (name, records) in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        for key, title in KEYS.items():
            points = points_of(records, key)
            if points:
                label = key if len(runs) == 1 else f"{name}: {key}"
                hue = COLOURS[1] if len(runs) == 1 and key == "validation_loss" else colour
                line = Line(label, hue, points, key in NOISY, key == "validation_loss")
                made.setdefault(title, Panel(title)).lines.append(line)
        for title, lines in _diagnostics(name, records, colour, len(runs) > 1).items():
            made.setdefault(title, Panel(title)).lines += lines
    steps = [record["step"] for _, records in runs for record in records]
    for panel in made.values():
        panel.span = min(steps), max(steps)  # one for all, so that what happened stands at one place in all
    order = {title: i for i, title in enumerate(KEYS.values())}
    return sorted(made.values(), key=lambda panel: (order.get(panel.title, len(KEYS)), panel.title))


def _diagnostics(name: str, records: Sequence[Mapping[str, Any]], colour: str, several: bool) -> dict[str, list[Line]]:
    """Every other key that has numbers: by what it says, the layers' lines or their mean."""
    keys = sorted({key for record in records for key in record} - KEYS.keys() - {"step"}, key=_natural)
    groups: dict[str, list[str]] = {}
    for key in keys:
        if points_of(records, key):
            groups.setdefault(key.split("/", 1)[-1] if key.startswith("layer.") else key, []).append(key)
    found: dict[str, list[Line]] = {}
    for title, members in groups.items():
        if several:
            sums: dict[int, list[float]] = {}
            for key in members:
                for step, y in points_of(records, key):
                    sums.setdefault(step, []).append(y)
            mean = [(step, sum(ys) / len(ys)) for step, ys in sorted(sums.items())]
            found[title] = [Line(f"{name}, mean of layers" if len(members) > 1 else name, colour, mean)]
        else:
            hues = [COLOURS[i % len(COLOURS)] for i in range(len(members))]
            found[title] = [
                Line(key.split("/")[0], hue, points_of(records, key)) for key, hue in zip(members, hues, strict=True)
            ]
    return found


def _natural(key: str) -> list[tuple[int, str]]:
    """layer.2 before layer.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def thin(points: Points, most: int = MOST) -> Points:
    """At most ``most`` points, with the least and the greatest of every stretch among them."""
    if len(points) <= most:
        return points
    count, kept = most // 2, []
    for i in range(count):
        stretch = points[i * len(points) // count : (i + 1) * len(points) // count]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def smooth(points: Points) -> Points:
    """The mean of the points around each; as they are when there are few."""
    reach = len(points) // SMOOTH
    if reach < 1:
        return points
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    spans = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, spans, strict=True)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two bounds, about ``count``."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Numbers beside an axis, with as many digits as tell them apart."""
    for digits in range(2, 9):
        told = [
            f"{y:,.0f}" if 10 <= abs(y) < 1e6 and y == round(y) else f"{y:,.{digits}g}".replace("e-0", "e-")
            for y in values
        ]
        close = all(
            abs(float(word.replace(",", "")) - y) <= 1e-3 * abs(y) for word, y in zip(told, values, strict=True)
        )
        if len(set(told)) == len(set(values)) and close:
            break
    return told


class Axes:
    """Steps to the right, values upwards; logarithmic when they are positive and span more than two decades."""

    def __init__(self, panel: Panel) -> None:
        every = [p for line in panel.lines for p in line.points]
        xs, ys = [x for x, _ in every], [y for _, y in every]
        self.left, last = panel.span or (min(xs), max(xs))
        self.right = max(last, self.left + 1)
        self.log = min(ys) > 0 and max(ys) > 100 * min(ys)
        low, high = (self._scaled(y) for y in (min(ys), max(ys)))
        pad = 0.04 * (high - low) or abs(high) * 0.05 or 1.0
        self.low, self.high = low - pad, high + pad

    def _scaled(self, y: float) -> float:
        return math.log10(y) if self.log else y

    def x(self, step: float) -> float:
        """Pixels from the left."""
        return LEFT + (step - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return TOP + (self.high - self._scaled(value)) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def rows(self) -> list[float]:
        """Values with a line of their own."""
        if not self.log:
            return ticks(self.low, self.high)
        return [10.0**e for e in range(math.ceil(self.low), math.floor(self.high) + 1)] or [10**self.low, 10**self.high]


def svg(panel: Panel) -> str:
    """The panel as an SVG; its points are beside it, for the page's script."""
    axes = Axes(panel)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}">']
    for y, told in zip(axes.rows(), labels(axes.rows()), strict=True):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.y(y):.1f}" y2="{axes.y(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{axes.y(y) + 4:.1f}" text-anchor="end">{told}</text>')
    for x in ticks(axes.left, axes.right, 6):
        if x == int(x):
            parts.append(f'<text x="{axes.x(x):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{int(x):,}</text>')
    for step, colour, what in panel.marks:
        if axes.left <= step <= axes.right:
            at = f'x1="{axes.x(step):.1f}" x2="{axes.x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
            parts.append(f'<line class="mark" {at} stroke="{colour}"><title>{escape(what)}</title></line>')
    for line in panel.lines:
        parts += _drawn(line, axes)
    parts.append(f'<text x="{(WIDTH + LEFT) / 2:.0f}" y="{HEIGHT - 2}" text-anchor="middle">step</text>')
    parts.append('<line class="at" y1="0" y2="0" x1="0" x2="0"/></svg>')
    return "".join(parts)


def _drawn(line: Line, axes: Axes) -> list[str]:
    look = f'fill="none" stroke="{line.colour}" stroke-linejoin="round"'
    look += ' stroke-dasharray="5 3"' if line.dashed else ""
    mean = smooth(line.points) if line.noisy else line.points
    made = []
    for points, style in ((line.points, 'stroke-width="1" opacity="0.3"'), (mean, 'stroke-width="1.8"')):
        if points is mean or mean is not line.points:
            path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in thin(points))
            made.append(f'<polyline points="{path}" {look} {style}/>')
    if len(line.points) <= 30:
        dots = [f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.2"/>' for x, y in line.points]
        made.append(f'<g fill="{line.colour}">{"".join(dots)}</g>')
    return made


def figure(panel: Panel) -> str:
    """The panel with its title, its legend and the numbers that the page's script shows under the pointer."""
    axes = Axes(panel)
    shared = {"left": axes.left, "right": axes.right, "x0": LEFT, "x1": WIDTH - RIGHT, "y0": TOP, "y1": HEIGHT - BOTTOM}
    lines = [
        {"label": line.label, "points": [(x, float(f"{y:.5g}")) for x, y in thin(line.points)]} for line in panel.lines
    ]
    told = escape(json.dumps(shared | {"lines": lines}, separators=(",", ":")), quote=True)
    keys = "".join(
        f'<span class="key{" dashed" if line.dashed else ""}" style="border-color:{line.colour}">{escape(line.label)}'
        "</span>"
        for line in panel.lines
    )
    head = f"<figcaption><b>{escape(panel.title)}</b> {keys}<output></output></figcaption>"
    return f'<figure data-told="{told}">{head}{svg(panel)}</figure>'
