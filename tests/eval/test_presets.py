"""The page of all presets side by side."""

import json

import pytest

from palimpsest.configs import HERE
from palimpsest.eval import presets
from palimpsest.models.describe import describe

FEW = ["transformer", "titans_lmm", "atlas"]
RUN = {
    "seconds": 90.0,
    "machine": {"cpu": "A CPU", "device": "cpu"},
    "versions": {"python": "3.11", "torch": "2.13"},
    "date": "2026-11-22T10:00:00",
}


def results(measure: str, **arms: tuple[float, float | None]) -> dict:
    """What an ablation writes, as far as the page reads it."""
    summary = [{"arm": name, "measures": {measure: {"mean": m, "sd": sd}}} for name, (m, sd) in arms.items()]
    return {
        "ablation": {"name": "tried", "about": "Some\n  bytes.", "seeds": [0, 1]},
        "summary": summary,
        "runs": [RUN, RUN],
    }


def test_all_presets_are_there_and_the_first_is_what_speed_is_compared_with() -> None:
    found = presets.names("tiny")
    assert found[0] == "transformer" and sorted(found) == sorted(path.stem for path in (HERE / "tiny").glob("*.yaml"))
    with pytest.raises(ValueError, match="size was 'small'; it must be one of 170m, 340m"):
        presets.names("small")


def test_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    """Speeds are medians of ratios within a round: a machine that is slower in one round changes none."""
    monkeypatch.setattr(presets, "names", lambda size: FEW)
    taken = iter([100.0, 80.0, 20.0, 10.0, 5.0, 3.0, 200.0, 120.0, 40.0])
    monkeypatch.setattr(presets, "measure", lambda *_: {"tokens_per_second": next(taken)})
    text, more, mqar = (tmp_path / f"{name}.json" for name in ("text", "more", "mqar"))
    text.write_text(json.dumps(results("validation_loss", transformer=(2.0, 0.25), titans_lmm=(1.5, None))))
    more.write_text(json.dumps(results("validation_loss", titans_lmm=(9.0, 0.0), atlas=(1.25, 0.5))))
    mqar.write_text(json.dumps(results("mean", atlas=(0.75, 0.125))))
    out = tmp_path / "presets.md"
    told = ["--text", str(text), str(more), "--mqar", str(mqar), "--rounds", "3", "--out", str(out)]
    assert presets.main(told) == 0
    written = out.read_text()
    assert capsys.readouterr().out.strip() == written.strip()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line.startswith("|")]
    rows = {name: others for name, *others in cells}
    for name, loss, right, speed in (
        ("transformer", "2.000 ± 0.250", "–", "1.00"),
        ("titans_lmm", "1.500", "–", "0.60"),
        ("atlas", "1.250 ± 0.500", "0.750 ± 0.125", "0.20"),
    ):
        sizes = describe(f"tiny/{name}")
        wanted = [
            f"{sizes.parameters:,}",
            f"{sizes.state_bytes:,}",
            f"{sizes.flops_per_token:,.0f}",
            loss,
            right,
            speed,
        ]
        assert rows[name][:-1] == wanted
    kernels = {name: others[-1] for name, others in rows.items() if name in FEW}
    assert kernels == {name: "Triton; plain torch on sm_80" if name == "atlas" else "Triton" for name in FEW}
    told_of = "ablations/tried`: Some bytes. 2 runs, seeds 0, 1, 3 minutes of one process on A CPU (cpu), 2026-11-22, "
    assert f"`python -m palimpsest.eval.ablate {told_of}python 3.11, torch 2.13." in written
    assert presets.main(["--text", str(mqar), "--rounds", "0"]) == 2
    assert "results of 'tried' have mean; they must have validation_loss" in capsys.readouterr().err
    assert presets.main(["--rounds", "0"]) == 0
    assert "speed" not in capsys.readouterr().out.lower()


def test_the_skills_of_mad_are_a_table_by_skill(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(presets, "names", lambda size: FEW)
    paths = []
    for number, (kind, arms) in enumerate(
        (
            ("noisy_recall", {"transformer": (0.5, None)}),
            ("compression", {"atlas": (0.25, 0.125)}),
            ("noisy_recall", {"atlas": (0.75, None), "transformer": (0.9, None)}),
        )
    ):
        found = results("mean", **arms)
        found["ablation"]["set"] = {"data": {"task": "mad", "options": {"kind": kind}}}
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(found))
    assert presets.main(["--mad", *map(str, paths), "--rounds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row for row in cells if len(row) == 3] == [
        ["preset", "noisy recall", "compression"],
        cells[-4],  # the rule below the titles
        ["transformer", "0.500", "–"],
        ["titans_lmm", "–", "–"],
        ["atlas", "0.750", "0.250 ± 0.125"],
    ]
    assert sum("ablations/tried`: Some bytes." in line for line in lines) == 3
    other = tmp_path / "other.json"
    other.write_text(json.dumps(results("mean", atlas=(0.5, None))))
    assert presets.main(["--mad", str(other), "--rounds", "0"]) == 2
    assert "--mad had results of 'tried'; they must be of a skill of MAD" in capsys.readouterr().err


def test_the_kernels_of_memories_are_told_and_why_there_are_none() -> None:
    path = presets.path_of
    assert path(("rms_norm × 3: plain torch, for x was 1; it must 2", "neural_memory × 2: Triton")) == "Triton"
    lines = ("neural_memory × 2: plain torch, for window was 4; it must be 1", "window_attention × 2: Triton")
    assert path(lines) == "plain torch: window 4"
    lines = ("neural_memory × 2: Triton, but plain torch on sm_80", "window_attention × 2: Triton")
    assert path(lines) == "Triton; plain torch on sm_80"
    assert path((*lines, "neural_memory × 2: plain torch, for window was 4; it must be 1")) == "plain torch: window 4"


@pytest.mark.parametrize("name", ["titans_mag", "memora", "atlas_pp", "tnt", "mom_hybrid", "hcam_titans", "lact"])
def test_presets_of_a_real_size_have_kernels(name: str) -> None:
    """All but LaCT, whose few wide heads and long chunks are batched products of plain torch; on Ampere also all of
    muon with a window."""
    path = presets.path_of(describe(f"170m/{name}").kernels)
    others = {"lact": "plain torch: q.shape[-1] 192", "atlas_pp": "Triton; plain torch on sm_80"}
    assert path == others.get(name, "Triton")
