"""Runs with every optimizer: stopped and resumed they learn the same bit for bit; several processes learn what one does."""

import signal

import pytest
import torch
from safetensors.torch import load_file
from training import learnt

from palimpsest.models import build, load

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
    import yaml
    from training import MODEL, TRAIN

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
    print([abs(a/b-1) for a,b in zip(*losses)])
    # The same sums in another order: what is not whole in each process would show at the second update.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def test_sltrain_leaves_an_ordinary_model(whole):
    """What the run exported is read as any model, and is what its B, A and S make."""
    folder = whole("sltrain")
    model = load(folder)
    assert set(dict(model.named_parameters())) == set(load_file(folder / "model.safetensors"))
