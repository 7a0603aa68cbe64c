"""What an ablation found: the best setting of each arm by validation, its test over the seeds, and the comparison."""

import csv
import io
import statistics as numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots, record
from .report import number, table
from .statistics import mean_sd, paired

Row = Mapping[str, Any]


def measures(row: Row) -> dict[str, float]:
    """What is reported of a run: its accuracy on each test group and on their mean, or its validation numbers."""
    if row["test"]:
        return {**row["test"], "mean": sum(row["test"].values()) / len(row["test"])}
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
        for name in measures(group[0]):
            values = {row["seed"]: measures(row)[name] for row in group}
            mean, sd = mean_sd(list(values.values()))
            both = sorted(values.keys() & reference.keys()) if arm != baseline else []
            p = paired([values[s] for s in both], [reference[s][name] for s in both]) if both else None
            entry["measures"][name] = {"mean": mean, "sd": sd, "p": p}
        summary.append(entry)
    return summary


def markdown(content: Mapping[str, Any]) -> str:
    """The table of an ablation."""
    ablation, summary = content["ablation"], content["summary"]
    names = list(summary[0]["measures"])
    heads = ["arm", "chosen", "parameters", "FLOPs/token", "state bytes", *names, "p"]
    rows = []
    for entry in summary:
        cells = [entry["measures"].get(name) for name in names]
        shown = [
            "–" if cell is None else number(cell["mean"]) + (f" ± {cell['sd']:.3f}" if cell["sd"] is not None else "")
            for cell in cells
        ]
        last = cells[-1]
        chosen = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in entry["settings"].items())
        sizes = [f"{entry[key]:,.0f}" for key in ("parameters", "flops_per_token", "state_bytes")]
        rows.append([entry["arm"], chosen or "–", *sizes, *shown, number(None if last is None else last["p"])])
    counts = sorted({entry["n"] for entry in summary})
    seeds = " or ".join(map(str, counts)) + (" seed" if counts == [1] else " seeds")
    where, versions = content["runs"][0]["machine"], content["runs"][0]["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    seconds = sum(row["seconds"] for row in content["runs"])
    tested = "the test examples" if content["runs"][0]["test"] else "the same held-out text, for there is no other"
    notes = [
        f"Mean ± standard deviation over {seeds}; the setting of each arm was chosen by "
        f"{ablation['select']}, and is reported on {tested}. FLOPs of a token's forward and backward, without "
        "the output head; state bytes of the tensors themselves, of one sequence, after training's length.",
    ]
    if ablation["baseline"]:
        notes.append(f"p: two-sided paired t-test of the last measure against {ablation['baseline']!r}.")
    notes.append(
        f"{len(content['runs'])} runs, {seconds / 60:.0f} minutes of one process on {where['cpu']} "
        f"({where['device']}), {content['runs'][0]['date'][:10]}, {told}."
    )
    about = [ablation["about"]] if ablation["about"] else []
    return "\n\n".join([f"# {ablation['name']}", *about, table(heads, rows), *notes]) + "\n"


def spreadsheet(rows: Sequence[Row]) -> str:
    """Every run, as CSV."""
    settings = sorted({key for row in rows for key in row["settings"]})
    sizes = ["parameters", "flops_per_token", "state_bytes", "loss", "seconds"]
    checks = sorted({key for row in rows for key in row if key.startswith("validation")})
    tests = list(dict.fromkeys(name for row in rows for name in measures(row)))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", *settings, "seed", *sizes, *checks, *(f"test {name}" for name in tests), "folder"])
    for row in rows:
        given, found = row["settings"], measures(row)
        values = [given.get(key) for key in settings], [row.get(key) for key in (*sizes, *checks)]
        writer.writerow(
            [row["arm"], *values[0], row["seed"], *values[1], *(found.get(k) for k in tests), row["folder"]]
        )
    return text.getvalue()


def draw(path: Path, summary: Sequence[Mapping[str, Any]]) -> bool:
    """Each measure of each arm with its standard deviation; False when matplotlib is missing."""
    if not plots.available():
        return False
    drawing, axes = plots.figure(1, 1, 7.5, 4.2)
    panel = axes[0][0]
    names = [name for name in summary[0]["measures"] if name != "mean"] or list(summary[0]["measures"])
    for colour, entry in zip(plots.COLOURS * len(summary), summary, strict=False):
        values = [entry["measures"][name] for name in names]
        panel.errorbar(
            range(len(names)),
            [value["mean"] for value in values],
            yerr=[value["sd"] or 0.0 for value in values],
            color=colour, marker="o", markersize=4, capsize=2, linewidth=1.4,
            label=f"{entry['arm']} ({entry['state_bytes']:,} state bytes)",
        )  # fmt: skip
    panel.set_xticks(range(len(names)), names)
    panel.grid(axis="y", color=plots.FAINT, linewidth=0.5)
    panel.legend(fontsize=8, frameon=False)
    text = any(name.startswith("validation") for name in names)
    labels = ("held-out text", "loss") if text else ("test examples", "share of right answers")
    plots.plain(panel, "Mean ± sd over seeds", *labels)
    plots.save(drawing, path)
    return True


def write(folder: Path, content: Mapping[str, Any]) -> str:
    """Write results.json, runs.csv, table.md and figure.png; the table."""
    text = markdown(content)
    record.write_json(folder / "results.json", dict(content))
    record.write_text(folder / "runs.csv", spreadsheet(content["runs"]))
    record.write_text(folder / "table.md", text)
    draw(folder / "figure.png", content["summary"])
    return text
