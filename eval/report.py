"""Tables in Markdown, which also read well in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, numbers to the right."""
    cells = [list(heads), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in cells]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def span(bucket: Mapping[str, Any]) -> str:
    """Positions of a bucket, first to last."""
    return f"{bucket['start']:,}–{bucket['stop'] - 1:,}"


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def perplexity(result: Mapping[str, Any]) -> str:
    """The loss by position of one model."""
    named = [(span(bucket), bucket) for bucket in result["buckets"]]
    named += [("within the training context", result["within"])]
    named += [("beyond it", result["beyond"])] if result["beyond"] else []
    rows = [
        [
            name,
            f"{item['tokens']:,}",
            number(item["loss"], 4),
            number(item["bits_per_byte"]),
            f"± {number(item['stderr'])}",
            number(item["fresh_bits_per_byte"]),
        ]
        for name, item in named
    ]
    fresh = f"bits/byte, fresh state each {result['context']:,}"
    return table(["position", "tokens", "loss (nats)", "bits/byte", "std. error", fresh], rows)


def side_by_side(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Bits per byte by position of several models on the same text, the least of each row marked with *."""
    columns = list(results.values())
    named = [
        (span(bucket), [column["buckets"][i] for column in columns]) for i, bucket in enumerate(columns[0]["buckets"])
    ]
    named.append(("within the training context", [column["within"] for column in columns]))
    if columns[0]["beyond"]:
        named.append(("beyond it", [column["beyond"] for column in columns]))
    named.append(("all positions", [column["overall"] for column in columns]))
    rows = []
    for name, items in named:
        shown = [number(item["bits_per_byte"]) for item in items]
        least = min(shown)
        rows.append([name, *(text + ("*" if text == least else " ") for text in shown)])
    return table(["position", *(f"{name} " for name in results)], rows)


def passkey(result: Mapping[str, Any]) -> str:
    """Retrieved / digits right, in percent, by depth (down) and length (across)."""
    lengths = sorted({cell["length"] for cell in result["cells"]})
    depths = sorted({cell["depth"] for cell in result["cells"]})
    cells = {(cell["depth"], cell["length"]): cell for cell in result["cells"]}
    rows = [
        [
            f"{100 * depth:.0f} %",
            *(f"{100 * cells[depth, n]['accuracy']:.0f} / {100 * cells[depth, n]['digits']:.0f}" for n in lengths),
        ]
        for depth in depths
    ]
    return table(["depth", *(f"{length:,}" for length in lengths)], rows)


def evaluation(record: Mapping[str, Any]) -> str:
    """The whole report of one run."""
    made, tasks = record["model"], record["tasks"]
    parts = [
        f"# Evaluation of {record['run']}",
        f"{made['parameters']:,} parameters; training context {made['context']:,}.",
    ]
    if "perplexity" in tasks:
        result = tasks["perplexity"]
        parts += [
            "## Held-out loss by position",
            f"{result['rows']} stretches of {result['length']:,} tokens, read with a carried state in pieces of "
            f"{result['context']:,}.",
            perplexity(result),
        ]
    if "passkey" in tasks:
        result = tasks["passkey"]
        parts += [
            "## Passkey retrieval",
            f"Number retrieved / digits right, in percent, by depth and length; {result['examples']} examples a cell. "
            "Chance: 0 / 10.",
            passkey(result),
        ]
    where = record["machine"]
    parts.append(
        f"{record['date']}, {record['seconds']} s on {where['cpu']} ({where['cores']} cores), {where['device']}."
    )
    return "\n\n".join(parts) + "\n"
