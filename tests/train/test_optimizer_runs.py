"""Runs with optimizers: killed and resumed they learn the same bit for bit; several processes learn what one does."""

import importlib
import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training import MODEL, TRAIN, learnt

from palimpsest.models import build, load

measure = importlib.import_module("palimpsest.train.optimizers.__main__")

OPTIONS = {
    "muon": [],
    "galore": ["train.galore={rank: 4, refresh_every: 2}"],
    "frugal": ["train.frugal={refresh_every: 2}"],
    "spam": ["train.spam={reset_every: 4, warmup_steps: 2, clip_after: 1, threshold: 2}"],
    "sltrain": ["train.sltrain={rank: 2, density: 0.1}"],
}
QUIET = ["train.steps=6", "train.validate_every=0", "train.diagnostics_every=0"]


def words(name: str) -> list[str]:
    """What chooses it on the command line."""
    return [*QUIET, *OPTIONS[name], f"train.optimizer={'adamw' if name == 'sltrain' else name}"]


@pytest.fixture(scope="module")
def whole(run, corpus, tmp_path_factory):
    """The folder of an undisturbed run of one process, by name, made when first asked for."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "seed": 3, "model": MODEL, "data": corpus, "train": TRAIN}))

    def of(name):
        out = folder / name
        if not out.exists():
            result = run(path, *words(name), f"train.out={out}")
            assert result.codes == [0], result.output
        return out

    return of


@pytest.mark.parametrize("name", ["frugal", "sltrain"])
def test_killed_and_resumed_it_learns_the_same_bit_for_bit(run, config, whole, tmp_path, name):
    """Killed behind a checkpoint that lies between two changes of the subspace; what is drawn is drawn again."""
    result = run(config, *words(name), signal=signal.SIGKILL, when="step 4/6")
    assert result.codes == [-signal.SIGKILL], result.output
    result = run(config, *words(name))
    assert result.codes == [0] and "going on after step" in result.output, result.output
    assert learnt(tmp_path / "run") == learnt(whole(name))
    same = (tmp_path / "run" / "model.safetensors").read_bytes() == (whole(name) / "model.safetensors").read_bytes()
    assert same


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("galore", ["train.parallel=ddp", "train.micro_batch_size=1"]),
        ("muon", ["train.parallel=fsdp"]),
        ("spam", ["train.parallel=fsdp"]),
        ("sltrain", ["train.parallel=fsdp"]),
    ],
)
def test_two_processes_learn_what_one_does(run, config, whole, tmp_path, name, arguments):
    result = run(config, *words(name), *arguments, processes=2)
    assert result.codes == [0, 0], result.output
    losses = [[record["loss"] for record in learnt(folder)] for folder in (tmp_path / "run", whole(name))]
    # The same sums in another order: what is not whole in each process would show at the second update.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def test_sltrain_leaves_an_ordinary_model(whole, tmp_path):
    """What the run exported is read as any model; without B A of its checkpoint it is S, at as many places as S has."""
    folder = whole("sltrain")
    model = load(folder)
    fresh = build({"model": model.config.model_dump()})
    assert set(load_file(folder / "model.safetensors")) == set(fresh.state_dict())
    dcp_to_torch_save(folder / "checkpoints" / "step-000006", tmp_path / "whole.pt")
    saved = torch.load(tmp_path / "whole.pt", weights_only=False)["model"]
    for name in (name.removesuffix(".B") for name in saved if name.endswith(".B")):
        rest = model.get_parameter(f"{name}.weight").detach() - 16.0 / 2 * saved[f"{name}.B"] @ saved[f"{name}.A"]
        sparse = rest.flatten()[rest.flatten().abs() > 1e-6]  # float32: what cancels leaves 1e-7
        torch.testing.assert_close(sparse, saved[f"{name}.values"], rtol=1e-4, atol=1e-6)


def test_the_table(corpus, tmp_path, capsys):
    """The command that measures: two updates of each, a row with the bytes of each, the best of two learning rates."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "model": MODEL, "data": corpus, "train": TRAIN}))
    options = ["train.galore.rank=4", "train.sltrain={rank: 2, density: 0.1}", "train.batch_size=2", "--updates", "2"]
    options += ["--lr", "1e-3", "1e-2", "--only", "adamw", "galore", "sltrain"]
    assert measure.main([str(path), *options, "--json", str(tmp_path / "table.json")]) == 0
    printed, parameters = capsys.readouterr().out, list(build({"model": MODEL}).parameters())
    rows = {row["name"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert list(rows) == ["adamw", "galore", "adamw + sltrain"]
    assert rows["adamw"]["trained_parameters"] == sum(p.numel() for p in parameters)
    assert rows["adamw"]["state_bytes"] == sum(8 * p.numel() + 4 for p in parameters)
    assert rows["galore"]["options"] == {"rank": 4, "refresh_every": 200, "scale": 0.25}
    for name, row in rows.items():
        assert row["bytes_per_parameter"] == row["state_bytes"] / rows["adamw"]["trained_parameters"]
        assert [one["lr"] for one in row["tried"]] == [1e-3, 1e-2]
        assert row["validation_loss"] == min(one["validation_loss"] for one in row["tried"])
        assert f"| {name} | {row['trained_parameters']:,} | {row['state_bytes']:,} |" in printed
    assert measure.main([str(path), "train.galore.rank=16", "--only", "galore"]) == 2
    assert "error: train.galore.rank was 16" in capsys.readouterr().err


def test_the_table_tells_the_peak(corpus, tmp_path, capsys):
    """Parameters, gradients and state are in it, of a model large enough to be seen beside code and activations."""
    path = tmp_path / "tiny.yaml"
    model = MODEL | {"dim": 512, "layers": 1, "mixer": {"kind": "attention", "heads": 2}, "ffn_hidden": 4096}
    path.write_text(yaml.safe_dump({"name": "tiny", "model": model, "data": corpus, "train": TRAIN}))
    options = ["train.validate_every=0", "--updates", "2", "--only", "adamw", "muon", "--peak"]
    assert measure.main([str(path), *options, "--json", str(tmp_path / "table.json")]) == 0
    adamw, muon = json.loads((tmp_path / "table.json").read_text())["rows"]
    fixed, printed = 8 * adamw["trained_parameters"], capsys.readouterr().out
    for row in (adamw, muon):
        assert row["peak_bytes"] > fixed + row["state_bytes"]
        assert f"{row['bytes_per_parameter']:.2f} | {row['peak_bytes']:,} |" in printed
    assert adamw["peak_bytes"] < 2 * (fixed + adamw["state_bytes"])
