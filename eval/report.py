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


def grid(result: Mapping[str, Any], down: str, scores: Sequence[str], head: str) -> str:
    """Scores in percent, one behind the other, of cells by ``down`` and by length (across)."""
    lengths = sorted({cell["length"] for cell in result["cells"]})
    places = sorted({cell[down] for cell in result["cells"]})
    cells = {(cell[down], cell["length"]): cell for cell in result["cells"]}
    rows = [
        [
            f"{100 * place:.0f} %" if down == "depth" else f"{place}",
            *(" / ".join(f"{100 * cells[place, n][score]:.0f}" for score in scores) for n in lengths),
        ]
        for place in places
    ]
    return table([head, *(f"{length:,}" for length in lengths)], rows)


def passkey(result: Mapping[str, Any]) -> str:
    """Retrieved / digits right, in percent, by depth (down) and length (across)."""
    return grid(result, "depth", ("accuracy", "digits"), "depth")


def retention(result: Mapping[str, Any]) -> str:
    """The loss of a passage read again, by gap."""
    rows = [
        [
            f"{item['gap']:,}",
            number(item["second"], 4),
            f"{number(item['difference'], 4)} ± {number(item['stderr'], 4)}",
            number(item["unread"], 4),
            f"{number(item['remembered'], 4)} ± {number(item['remembered_stderr'], 4)}",
        ]
        for item in result["gaps"]
    ]
    return table(["gap", "second reading", "second − first", "unread", "second − unread"], rows)


def examples(result: Mapping[str, Any]) -> str:
    """The scores of a task's groups."""
    known = ("name", "length", "examples", "state_bytes")
    scores = [key for key in result["groups"][0] if key not in known]
    rows = [
        [
            group["name"],
            f"{group['length']:,}",
            f"{group['examples']:,}",
            *(number(group[score], 4) for score in scores),
            f"{group['state_bytes']:,}",
        ]
        for group in result["groups"]
    ]
    return table(["group", "length", "examples", *scores, "state bytes"], rows)


def _perplexity(result: Mapping[str, Any]) -> list[str]:
    return [
        "## Held-out loss by position",
        f"{result['rows']} stretches of {result['length']:,} tokens, read with a carried state in pieces of "
        f"{result['context']:,}.",
        perplexity(result),
    ]


def _passkey(result: Mapping[str, Any]) -> list[str]:
    return [
        "## Passkey retrieval",
        f"Number retrieved / digits right, in percent, by depth and length; {result['examples']} examples a cell. "
        "Chance: 0 / 10.",
        passkey(result),
    ]


def _niah(result: Mapping[str, Any]) -> list[str]:
    parts = [
        "## Needle in a haystack",
        f"Value retrieved / characters right, in percent, by depth and length; {result['examples']} examples a cell. "
        "Prompt and needle are worded as RULER's, the filler is not RULER's: published scores do not compare.",
    ]
    for variant in result["variants"]:
        parts += [f"### {variant['name']}", passkey(variant)]
    return parts


def _facts(result: Mapping[str, Any]) -> list[str]:
    return [
        "## Facts in filler",
        f"Right answer said / likeliest of six, in percent, by supporting facts and length; {result['examples']} "
        f"examples a cell, {result['facts']} facts each, filler: {result['filler']}. Chance of the second: 17. Stories "
        "are this project's own: official scores of bAbI or BABILong do not compare.",
        grid(result, "supports", ("accuracy", "choice"), "facts needed"),
    ]


def _retention(result: Mapping[str, Any]) -> list[str]:
    return [
        "## Retention",
        f"Nats per token of a passage of {result['passage']} tokens read again after a gap, over {result['rows']} "
        f"passages; read first: {result['first']:.4f}. Unread: the same passage behind the same gap, not read before "
        "it; second − unread is what the first reading is worth.",
        retention(result),
    ]


TEXTS = {
    "perplexity": _perplexity,
    "passkey": _passkey,
    "niah": _niah,
    "facts": _facts,
    "retention": _retention,
}


def _chunk_size(told: Mapping[str, Any]) -> list[str]:
    """Scores at the chunk size asked for and at the trained one."""
    trained = ", ".join(map(str, told["trained"]))
    rows = [[f"{x['task']}: {x['score']}", number(x["asked"], 4), number(x["trained"], 4)] for x in told["compared"]]
    return [
        f"All below is at chunk size {told['asked']}; the memories were trained at {trained}.",
        *([table(["", f"at {told['asked']}", f"at {trained}"], rows)] if rows else []),
    ]


def evaluation(record: Mapping[str, Any]) -> str:
    """The whole report of one run."""
    made, tasks = record["model"], record["tasks"]
    parts = [
        f"# Evaluation of {record['run']}",
        f"{made['parameters']:,} parameters; training context {made['context']:,}.",
    ]
    parts += _chunk_size(record["chunk_size"]) if "chunk_size" in record else []
    for name, result in tasks.items():
        parts += TEXTS[name](result) if name in TEXTS else [f"## {name}", examples(result)]
    where = record["machine"]
    parts.append(
        f"{record['date']}, {record['seconds']} s on {where['cpu']} ({where['cores']} cores), {where['device']}."
    )
    return "\n\n".join(parts) + "\n"
