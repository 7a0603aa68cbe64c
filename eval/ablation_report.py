"""What an ablation found: the best setting of each arm by validation, its test over the seeds, and the comparison."""

import csv
import io
import statistics as numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train.config import RunConfig
from . import ablation_page, ablation_plots, record
from .match import UNITS
from .report import number, table
from .statistics import mean_sd, paired

Row = Mapping[str, Any]


def measures(row: Row) -> dict[str, float]:
    """What is reported of a run: its accuracy on each test group and on their mean, then the mean over groups of each
    further score that its task gives; or, on text, its validation numbers."""
    if row["test"]:
        groups = row.get("scores", {}).values()
        names = dict.fromkeys(name for group in groups for name in group)
        others = {name: numbers.fmean(group[name] for group in groups if name in group) for name in names}
        return {**row["test"], "mean": sum(row["test"].values()) / len(row["test"]), **others}
    return {key: row[key] for key in ("validation_loss", "validation_bits_per_byte") if row.get(key) is not None}


def summarise(rows: Sequence[Row], select: str, largest: bool, baseline: str | None) -> list[dict[str, Any]]:
    """One entry an arm: its chosen setting, sizes, and every measure's mean, sd, n and p-value against the baseline.

    Raises:
        ValueError: when a run lacks the measure that settings are selected by.
    """
    arms: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.get(select) is None:
            known = sorted(key for key, value in row.items() if key.startswith("validation") and value is not None)
            raise ValueError(f"select was {select!r}; the runs have {', '.join(known) or 'no validation'}")
        arms.setdefault(row["arm"], {}).setdefault(str(row["settings"]), []).append(row)
    sign = 1 if largest else -1
    chosen = {
        arm: max(settings.values(), key=lambda group: sign * numbers.fmean(row[select] for row in group))
        for arm, settings in arms.items()
    }
    reference = {row["seed"]: measures(row) for row in chosen.get(baseline or "", [])}
    summary = []
    for arm, group in chosen.items():
        entry: dict[str, Any] = {"arm": arm, "settings": group[0]["settings"], "n": len(group), "measures": {}}
        entry |= {key: group[0][key] for key in ("parameters", "flops_per_token", "state_bytes")}
        entry["seconds"] = numbers.fmean(row["seconds"] for row in group)
        entry |= {"match": group[0]["match"]} if "match" in group[0] else {}
        for name in measures(group[0]):
            values = {row["seed"]: measures(row)[name] for row in group}
            mean, sd = mean_sd(list(values.values()))
            both = sorted(values.keys() & reference.keys()) if arm != baseline else []
            p = paired([values[s] for s in both], [reference[s][name] for s in both]) if both else None
            entry["measures"][name] = {"mean": mean, "sd": sd, "p": p}
        summary.append(entry)
    return summary


def compared(entry: Mapping[str, Any]) -> str:
    """The measure that arms are compared by: the mean over test groups, or the last of the validation numbers."""
    return "mean" if "mean" in entry["measures"] else list(entry["measures"])[-1]


def cells(summary: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of an ablation."""
    names = list(summary[0]["measures"])
    matched = any("match" in entry for entry in summary)
    heads = ["arm", "chosen", *(["match"] if matched else []), "parameters", "FLOPs/token", "state bytes", *names, "p"]
    rows = []
    for entry in summary:
        found = [entry["measures"].get(name) for name in names]
        shown = [
            "–" if cell is None else number(cell["mean"]) + (f" ± {cell['sd']:.3f}" if cell["sd"] is not None else "")
            for cell in found
        ]
        judged = entry["measures"].get(compared(summary[0]))
        chosen = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in entry["settings"].items())
        sizes = [f"{entry[key]:,.0f}" for key in ("parameters", "flops_per_token", "state_bytes")]
        match = entry.get("match")
        told = (
            "–"
            if match is None
            else f"{match['width'].split('.')[-1]} {match['value']} ({match['percent_off']:+.1f} %)"
        )
        p = number(None if judged is None else judged["p"])
        rows.append([entry["arm"], chosen or "–", *([told] if matched else []), *sizes, *shown, p])
    return heads, rows


def notes(content: Mapping[str, Any]) -> list[str]:
    """What must be known to read the table, a paragraph each."""
    ablation, summary, runs = content["ablation"], content["summary"], content["runs"]
    counts = sorted({entry["n"] for entry in summary})
    seeds = " or ".join(map(str, counts)) + (" seed" if counts == [1] else " seeds")
    seconds = sum(row["seconds"] for row in runs)
    tested = "the test examples" if runs[0]["test"] else "the same held-out text, for there is no other"
    said = [
        f"Mean ± standard deviation over {seeds}; the setting of each arm was chosen by "
        f"{ablation['select']}, and is reported on {tested}. FLOPs of a token's forward and backward, without "
        "the output head; state bytes of the tensors themselves, of one sequence, after training's length.",
    ]
    ways = dict.fromkeys((e["match"]["by"], e["match"]["width"]) for e in summary if "match" in e)
    if ways:
        found = ", ".join(f"{UNITS[by]} by {width}" for by, width in ways)
        said.append(f"Match: {found} were solved for, with what is missed of the target in brackets.")
    if ablation.get("stream"):
        said.append(f"The test was read {ablation['stream']} tokens at a time, with a carried state.")
    if ablation["baseline"]:
        said.append(
            f"p: two-sided paired t-test of {compared(summary[0])} against {ablation['baseline']!r}, paired by seed."
        )
    said.append(f"{len(runs)} runs, {seconds / 60:.0f} minutes of one process on {record.places(runs)}.")
    return said


def markdown(content: Mapping[str, Any]) -> str:
    """The table of an ablation."""
    ablation = content["ablation"]
    about = [ablation["about"]] if ablation["about"] else []
    parts = [f"# {ablation['name']}", *about, table(*cells(content["summary"])), *notes(content)]
    return "\n\n".join(parts) + "\n"


def spreadsheet(rows: Sequence[Row]) -> str:
    """Every run, as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(listed(rows))
    return text.getvalue()


def listed(rows: Sequence[Row]) -> list[list[Any]]:
    """Heads, then every run's settings, sizes and numbers: each score of each test group, too."""
    settings = sorted({key for row in rows for key in row["settings"]})
    sizes = ["parameters", "flops_per_token", "state_bytes", "loss", "seconds"]
    checks = sorted({key for row in rows for key in row if key.startswith("validation")})
    tests = list(dict.fromkeys(name for row in rows for name in measures(row)))
    scores = list(dict.fromkeys((g, name) for row in rows for g, s in row.get("scores", {}).items() for name in s))
    heads = [*(f"test {name}" for name in tests), *(f"{name} {group}" for group, name in scores)]
    lines = [["arm", *settings, "seed", *sizes, *checks, *heads, "folder"]]
    for row in rows:
        found, given = measures(row), row.get("scores", {})
        values = [row["settings"].get(key) for key in settings], [row.get(key) for key in (*sizes, *checks)]
        other = [given.get(group, {}).get(name) for group, name in scores]
        lines.append(
            [row["arm"], *values[0], row["seed"], *values[1], *(found.get(k) for k in tests), *other, row["folder"]]
        )
    return lines


def write(folder: Path, content: Mapping[str, Any], configs: Mapping[str, RunConfig] | None = None) -> str:
    """Write results.json, runs.csv, table.md, the figures, and report.html with all of it; the table.

    ``configs``: of the runs, by the name of their folder; loss curves are drawn of those that are given.
    """
    text = markdown(content)
    record.write_json(folder / "results.json", dict(content))
    record.write_text(folder / "runs.csv", spreadsheet(content["runs"]))
    record.write_text(folder / "table.md", text)
    drawn = ablation_plots.draw(folder, content, configs or {})
    heads, *rows = listed(content["runs"])
    tables = {"Arms": cells(content["summary"]), "Runs": (heads, rows)}
    record.write_text(folder / "report.html", ablation_page.page(content, tables, notes(content), drawn))
    return text
