"""Results of ablations: what is chosen, compared and drawn, and the page that holds it."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from palimpsest.eval import ablation_plots, ablation_report
from palimpsest.train.config import read_config
from palimpsest.train.page import shown


def row(arm: str, rate: float, seed: int, checked: float, tested: float) -> dict:
    sizes = {"parameters": 1, "flops_per_token": 2, "state_bytes": 3, "seconds": 4.0}
    tests = {"a": tested, "b": tested + 0.2}
    return {"arm": arm, "settings": {"lr": rate}, "seed": seed, "validation_accuracy": checked, "test": tests, **sizes}


def test_settings_are_chosen_on_validation_and_not_on_the_test() -> None:
    rows = [row("x", 1.0, seed, 0.9, 0.3 + 0.1 * seed) for seed in (0, 1)]
    rows += [row("x", 2.0, seed, 0.8, 0.7) for seed in (0, 1)]  # better on the test, worse on validation
    rows += [row("y", 1.0, seed, 0.5, 0.1 + 0.2 * seed) for seed in (0, 1)]
    x, y = ablation_report.summarise(rows, "validation_accuracy", True, "y")
    assert x["settings"] == {"lr": 1.0} and x["measures"]["a"]["mean"] == pytest.approx(0.35)
    assert x["measures"]["mean"]["mean"] == pytest.approx(0.45) and x["measures"]["a"]["sd"] == pytest.approx(
        0.0707, abs=1e-4
    )
    # Differences 0.2 and 0.1: t = 3 with one degree of freedom, p = 1 − 2 atan(3) / π.
    assert x["measures"]["a"]["p"] == pytest.approx(0.20483, abs=1e-5) and y["measures"]["a"]["p"] is None
    about = {"machine": {"cpu": "c", "device": "cpu"}, "versions": {}, "date": "2"}
    text = [{**x, **about, "test": {}, "validation_loss": 2.0} for x in rows[:2]]
    content = {"ablation": {"name": "t", "about": "", "select": "validation_loss", "baseline": None}, "runs": text}
    content["summary"] = ablation_report.summarise(text, "validation_loss", False, None)
    assert "reported on the same held-out text" in ablation_report.markdown(content)
    assert ablation_report.summarise(rows, "validation_accuracy", False, None)[0]["settings"] == {"lr": 2.0}
    with pytest.raises(ValueError, match="select was 'loss'; the runs have validation_accuracy"):
        ablation_report.summarise(rows, "loss", True, None)


ABOUT = {"machine": {"cpu": "c", "device": "cpu"}, "versions": {"python": "3"}, "date": "2026-01-02T03:04"}


def dances(arm: str, seed: int, size: int) -> dict:
    """A run on groups of dancers and delays, with two further scores."""
    tests = {f"{n}x{delay}": 1 / n + 0.001 * delay * seed for n in (2, 4) for delay in (16, 48, 96)}
    scores = {name: {"legal": 0.5 + 0.1 * seed} for name in tests} | {"2x16": {"legal": 0.5, "l1": 0.25}}
    sizes = {"parameters": 10, "flops_per_token": 20.0, "state_bytes": size, "seconds": 4.0, "loss": 1.0}
    match = {"by": "flops", "width": "model.dim", "value": 40, "target": 20.0, "reached": 20.2, "percent_off": 1.0}
    return {
        "arm": arm, "settings": {"train.lr": 0.1}, "seed": seed, "folder": f"{arm}{seed}", "validation_accuracy": 0.5,
        "test": tests, "scores": scores, **sizes, **ABOUT, **({"match": match} if arm == "b" else {}),
    }  # fmt: skip


def told(stream: int | None = None) -> dict:
    rows = [dances(arm, seed, size) for arm, size in (("a", 1000), ("b", 3000)) for seed in (0, 1)]
    asked = {"name": "t </script>", "about": "what & why", "select": "validation_accuracy", "baseline": "a"}
    summary = ablation_report.summarise(rows, "validation_accuracy", True, "a")
    return {"ablation": asked | {"stream": stream, "axes": None}, "runs": rows, "summary": summary, "command": "go"}


def test_further_scores_and_matches_are_in_the_table() -> None:
    content = told(stream=64)
    heads, rows = ablation_report.cells(content["summary"])
    assert heads[2] == "match" and rows[0][2] == "–" and rows[1][2] == "dim 40 (+1.0 %)"
    assert heads[-4:] == ["mean", "legal", "l1", "p"] and heads[6] == "2x16"
    # Seed 1 says 0.6 of five groups and 0.5 of one, seed 0 says 0.5.
    assert rows[0][-3] == "0.542 ± 0.059" and rows[0][-2].startswith("0.250 ± 0.000")
    assert rows[1][-1] == "1.000"  # of the mean, where the arms are equal; not of l1
    said = "\n".join(ablation_report.notes(content))
    assert "FLOPs per token by model.dim were solved for" in said and "64 tokens at a time" in said
    assert "paired t-test of mean against 'a'" in said
    lines = list(csv.DictReader(io.StringIO(ablation_report.spreadsheet(content["runs"]))))
    assert lines[1]["legal 4x96"] == "0.6" and lines[1]["l1 2x16"] == "0.25" and "l1 4x96" not in lines[1]
    assert lines[1]["test 2x48"] == "0.548" and lines[1]["folder"] == "a1"


def test_figures_and_a_page_that_needs_no_network(tmp_path: Path) -> None:
    content = told()
    config = read_config(
        {
            "name": "t", "model": {"vocab_size": 9, "dim": 4, "layers": 1, "mixer": {"kind": "attention", "heads": 1}},
            "train": {"batch_size": 3, "seq_len": 5},
        }
    )  # fmt: skip
    for i, run in enumerate(content["runs"]):
        (tmp_path / run["folder"]).mkdir()
        lines = [{"step": step, "loss": float(step + i)} for step in (10, 20, 30)][: 3 - i % 2]
        path = tmp_path / run["folder"] / "metrics.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    entry = content["summary"][0]
    assert ablation_plots.curves(content["runs"], entry, tmp_path) == ([10, 20], [10.5, 20.5])
    assert ablation_plots.tokens_per_step(config) == 15
    ablation_report.write(tmp_path, content, {run["folder"]: config for run in content["runs"]})
    for name in ("figure", "numbers", "state", "loss"):
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG", name
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and page.count("<table>") == 2
    assert not re.search(r"(src|href)=.(?!data:)|https?:|@import|fetch\(", page)
    assert "<h1>t &lt;/script&gt;</h1>" in page and "what &amp; why" in page and page.count("</script>") == 1
    assert page.count('<tr class="baseline">') == 3 and "<pre>go</pre>" in page


def test_which_groups_are_drawn_by_their_second_number() -> None:
    assert ablation_plots.numbered(["2x16", "2x48", "4x16", "4x48"]) == {2: [16, 48], 4: [16, 48]}
    assert ablation_plots.numbered(["64x4", "64x8", "128x32"]) is None  # one of a kind has no curve
    assert ablation_plots.numbered(["echo", "2x16", "2x48"]) is None
    assert len({tuple(ablation_plots.look(i).values()) for i in range(100)}) == 100
    assert shown(None) == "–" and shown(0.123456789) == "0.12346"


def test_tokens_of_a_step_of_a_task() -> None:
    options = {"train": [[16, 2, 6], [32, 2, 4]], "validation": [[16, 2, 2]], "test": [[16, 2, 2]], "vocabulary": 16}
    model = {"vocab_size": 16, "dim": 4, "layers": 1, "mixer": {"kind": "attention", "heads": 1}}
    config = read_config(
        {
            "name": "t", "model": model, "data": {"source": "task", "task": "mqar", "options": options},
            "train": {"batch_size": 2, "seq_len": 32},
        }
    )  # fmt: skip
    assert ablation_plots.tokens_per_step(config) == 2 * (3 * 16 + 2 * 32) / 5
