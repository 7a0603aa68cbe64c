"""The loop: what it writes, what it refuses, and that it survives bad numbers and a full disk."""

import json
import math

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import STEPS, learnt

from palimpsest.models import load
from palimpsest.models.config import ConfigError
from palimpsest.train import launch, parallel, read_config, train
from palimpsest.train.checkpoint import MANIFEST, ConfigMismatch
from palimpsest.train.config import RunConfig
from palimpsest.train.data import DataError, prepare
from palimpsest.train.split import IGNORE


def read(content, **overrides):
    return read_config(content, {key.replace("__", "."): value for key, value in overrides.items()})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- what it writes ---------------------------------------------------------------------------------------------------


def test_a_run_in_process_leaves_everything_and_sums_it_up(content, tmp_path, capsys):
    heard = []
    summary = train(read(content, train__log_every=4, train__tensorboard=True), heard.append)
    folder = tmp_path / "run"
    assert (summary.folder, summary.status, summary.step, summary.resumed_from) == (folder, "complete", STEPS, 0)
    expected = ["checkpoints", "config.json", "config.yaml", "events.jsonl", "metrics.jsonl", "model.safetensors"]
    assert names(folder) == [*expected, "tensorboard"]
    assert [record["step"] for record in heard] == [4, 5, 6, 8, 10, 12, 15, 16]  # logged, diagnosed or validated
    for record in heard:
        assert {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory"} <= record.keys()
        assert record["tokens_per_second"] > 0 and 0 < record["mfu"] < 1.5 and record["peak_memory"] > 10**7
        assert ("validation_loss" in record) == (record["step"] in (6, 12, 16))
        for name in ("retention", "momentum", "step", "loss_before", "loss_after", "state_norm", "gate"):
            assert (f"layer.1/{name}" in record) == (record["step"] % 5 == 0)
    assert summary.loss == heard[-1]["loss"] < heard[0]["loss"]
    assert summary.validation_loss == heard[-1]["validation_loss"]
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    texts = events.Tensors("sample/text_summary")
    assert [event.step for event in texts] == [6, 12, 16]
    assert all(event.tensor_proto.string_val[0].startswith(b"    def ") for event in texts)
    assert [event.step for event in events.Histograms("layer.1/gate")] == [5, 10, 15]
    assert events.Histograms("layer.1/retention")[0].histogram_value.num == 4 * 16
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "ETA" in line] == ["4/16", "8/16", "12/16", "16/16"]
    again = train(read(content, train__log_every=4, train__tensorboard=True))
    assert (again.status, again.step, again.resumed_from) == ("complete", STEPS, STEPS)
    assert (again.loss, again.validation_loss) == (summary.loss, summary.validation_loss)


def test_the_held_out_loss_is_that_of_the_exported_model(content, tmp_path):
    """Recomputed from model.safetensors with log_softmax, window by window."""
    config = read(content)
    summary = train(config)
    record = learnt(tmp_path / "run")[-1]
    model = load(tmp_path / "run")
    split = prepare(config.data).split("validation")
    nats = valid = 0.0
    for index in range(2):
        batch = split.batch(index, seed=0, batch_size=4, seq_len=16)
        with torch.no_grad():
            chances = model(batch.tokens).logits.double().log_softmax(-1)
        keep = batch.targets != IGNORE
        nats -= float(chances.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0][keep].sum())
        valid += int(keep.sum())
    assert summary.validation_loss == pytest.approx(nats / valid, rel=1e-5)  # float32 against float64
    assert record["validation_bits_per_byte"] == pytest.approx(nats / valid / math.log(2), rel=2e-2)  # separators


def test_the_resolved_config_stands_in_the_folder_from_the_start(content, tmp_path):
    config = read(content, train__steps=4)
    train(config)
    assert read_config(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())) == config
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"] == config.plain()


# -- what changes the way and not the result --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """The losses of a short run with default settings."""
    from training import MODEL, TRAIN

    out = tmp_path_factory.mktemp("plain") / "run"
    content = {
        "name": "tiny",
        "seed": 3,
        "model": MODEL,
        "data": corpus,
        "train": TRAIN | {"out": str(out), "steps": 6},
    }
    train(read_config(content))
    return [(record["loss"], record["grad_norm"]) for record in learnt(out)]


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ({"train__activation_checkpointing": True}, 0.0),  # the same operations once more
        ({"train__micro_batch_size": 1}, 2e-5),  # float32 sums in another order, over six updates
        ({"train__parallel": "fsdp"}, 0.0),  # one process: nothing to spread
    ],
)
def test_how_it_is_computed_does_not_change_what_is_learnt(content, plain, tmp_path, overrides, tolerance):
    train(read(content, train__steps=6, **overrides))
    found = [(record["loss"], record["grad_norm"]) for record in learnt(tmp_path / "run")]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=tolerance, atol=0)


def test_bf16_keeps_float32_weights_and_stays_near_fp32(content, plain, tmp_path):
    train(read(content, train__steps=6, train__precision="bf16"))
    found = [record["loss"] for record in learnt(tmp_path / "run")]
    assert found != [loss for loss, _ in plain]
    # bfloat16 has 8 significant bits; a loss is a mean over 64 targets.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain)[:, 0], rtol=2e-2, atol=0)
    assert {parameter.dtype for parameter in load(tmp_path / "run").parameters()} == {torch.float32}


def test_packed_documents_train(content, tmp_path):
    content["data"] = content["data"] | {"documents": "packed"}
    train(read(content, train__micro_batch_size=2, train__steps=6))
    assert learnt(tmp_path / "run")[-1]["loss"] < learnt(tmp_path / "run")[0]["loss"]


MIXTURE = {"kind": "mixture", "heads": 2, "memories": 4, "top_k": 1, "balance_weight": 1.0}


@pytest.mark.parametrize("overrides", [{}, {"train__micro_batch_size": 1, "train__activation_checkpointing": True}])
def test_further_losses_are_minimised_and_not_reported_as_the_loss(content, tmp_path, overrides):
    """A router that is pushed to spread its tokens ends up less uneven than one that is not."""
    content["model"] = content["model"] | {"mixer": MIXTURE}
    ends = []
    for weight in (0.0, 1.0):
        out = tmp_path / f"run {weight} {len(overrides)}"
        given = {
            "train__out": str(out),
            "train__steps": 12,
            "train__diagnostics_every": 12,
            "model__mixer__balance_weight": weight,
        }
        train(read(content, **given, **overrides))
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        ends.append((learnt(out)[0]["loss"], next(r["layer.0/balance"] for r in records if "layer.0/balance" in r)))
    (loss, uneven), (same, even) = ends
    assert loss == same, "the first loss is that of the same weights"
    assert even < uneven


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.fixture
def started(content, tmp_path):
    """A run of this test that has been trained for four steps."""
    content["train"] = content["train"] | {"steps": 4}
    train(read(content))
    return tmp_path / "run"


def test_a_folder_of_another_config_is_refused_and_left_alone(content, started):
    before = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    with pytest.raises(ConfigMismatch, match=r"train.lr: 0.01 -> 0.02; train.steps: 4 -> 8$"):
        train(read(content, train__lr=0.02, train__steps=8, train__log_every=3))
    with pytest.raises(ConfigMismatch, match=r"there -> here: model.dim: 16 -> 32$"):
        train(read(content, model__dim=32))
    with pytest.raises(ConfigError, match="train.resume was 'never', but .* holds a run"):
        train(read(content, train__resume="never"))
    assert before == {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}


def test_a_folder_where_a_run_is_at_work_is_refused(content, tmp_path):
    config = read(content)
    world = parallel.start("cpu")
    with launch.hold(config.folder, world), pytest.raises(ConfigError, match="another run is at work"):
        train(config)
    assert names(config.folder) == []
    assert train(config).status == "complete", "and free again"


def test_settings_that_do_not_change_what_is_learnt_may_change(content, started):
    assert train(read(content, train__log_every=3, eval__prompt="x")).status == "complete"
    assert yaml.safe_load((started / "config.yaml").read_text())["train"]["log_every"] == 3


def test_a_checkpoint_from_before_a_key_was_there_fits(content, tmp_path, monkeypatch):
    """Its model section, as it was written then, lacks a key of the mixer's."""
    old, now = tmp_path / "run", tmp_path / "new"
    with monkeypatch.context() as then:
        plain = RunConfig.plain
        then.setattr(RunConfig, "plain", lambda self: without(plain(self), "rope"))
        train(read(content, train__steps=4))
    (manifest,) = (json.loads(path.read_text()) for path in old.glob(f"checkpoints/step-000004/{MANIFEST}"))
    assert "rope" not in manifest["model"]["mixer"][0] and "heads" in manifest["model"]["mixer"][0]
    assert train(read(content, train__out=str(now), train__steps=6, train__resume=str(old))).resumed_from == 4


def without(plain, key):
    """A run's configuration whose mixers have one key less."""
    mixers = [{name: value for name, value in mixer.items() if name != key} for mixer in plain["model"]["mixer"]]
    return plain | {"model": plain["model"] | {"mixer": mixers}}


def test_a_new_run_may_start_from_another_ones_checkpoint_of_the_same_model(content, started, tmp_path):
    new = {"train__out": str(tmp_path / "new"), "train__steps": 6, "train__resume": str(started)}
    summary = train(read(content, **new))
    assert (summary.resumed_from, summary.step) == (4, 6)
    assert [record["step"] for record in learnt(tmp_path / "new")] == [5, 6]
    new["train__out"] = str(tmp_path / "wider")
    with pytest.raises(ConfigMismatch, match=r"step-000004 does not fit this config: dim: 16 -> 32$"):
        train(read(content, model__dim=32, **new))
    with pytest.raises(ConfigError, match="train.resume was 'nowhere'; it must be auto, never, or the folder"):
        train(read(content, train__out=str(tmp_path / "third"), train__resume="nowhere"))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="that run has no sound checkpoint"):
        train(read(content, train__out=str(tmp_path / "fourth"), train__resume=str(tmp_path / "empty")))


def test_a_corpus_that_does_not_fit_is_refused(content):
    with pytest.raises(ConfigError, match="model.vocab_size was 100; it must be at least 256, .*tokenizer 'bytes'"):
        train(read(content, model__vocab_size=100))
    with pytest.raises(DataError, match="train.seq_len was 1000000, but the train split"):
        train(read(content, train__seq_len=10**6, train__out=content["train"]["out"] + "-long"))
    with pytest.raises(DataError, match="train.seq_len was 12000, but the validation split"):
        train(read(content, train__seq_len=12000, train__out=content["train"]["out"] + "-held-out"))


def test_no_gpu_is_named(content):
    with pytest.raises(ValueError, match="train.device was 'cuda'; it must be 'cpu' or 'auto'"):
        train(read(content, train__device="cuda"))


# -- bad numbers ------------------------------------------------------------------------------------------------------

# The loss is multiplied by a bad factor at some updates, in some processes.
BAD_LOSS = """
from palimpsest.train.loop import Run
inner = Run.backward
def backward(self, batch, valid):
    if self.step in {steps} and rank in {ranks}:
        with __import__("torch").no_grad():
            self.core.embed.weight.mul_(1)  # nothing: the weights themselves stay good
        forward = self.forward
        self.forward = lambda batch: scaled(forward(batch))
        try:
            return inner(self, batch, valid)
        finally:
            self.forward = forward
    return inner(self, batch, valid)
def scaled(output):
    output.loss_sum = output.loss_sum * float("{factor}")
    return output
Run.backward = backward
"""


def test_a_step_that_is_not_finite_is_named_and_skipped(run, config, tmp_path):
    result = run(config, prelude=BAD_LOSS.format(steps={6}, ranks={0}, factor="nan"))
    assert result.codes == [0], result.output
    assert "step 6: loss nan, gradient norm nan: the update is skipped (1 in a row)" in result.output
    records = learnt(tmp_path / "run")
    assert [record["step"] for record in records if record["loss"] is None] == [6]
    assert names(tmp_path / "run" / "checkpoints") == ["step-000015", "step-000016"]


def test_a_bad_step_leaves_weights_and_optimizer_as_they_were(run, config, tmp_path):
    """Steps 5 and 6 of 6 are bad: the end is that of step 4, apart from the name."""
    result = run(config, "train.steps=6", prelude=BAD_LOSS.format(steps={5, 6}, ranks={0}, factor="inf"))
    assert result.codes == [0] and result.output.count("the update is skipped") == 2
    steps = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert run(config, "train.steps=6", f"train.out={tmp_path / 'good'}", signal=15, when="step 4/6").codes == [0]
    good = learnt(tmp_path / "good")
    assert good[:4] == learnt(tmp_path / "run")[:4]
    if len(good) == 4:
        assert (tmp_path / "good" / "model.safetensors").read_bytes() == steps


def test_too_many_bad_steps_stop_the_run_and_nothing_is_overwritten(run, config, tmp_path):
    prelude = BAD_LOSS.format(steps=set(range(8, 17)), ranks={0}, factor="nan")
    result = run(config, "train.max_bad_steps=3", prelude=prelude)
    assert result.codes == [1]
    expected = "error: step 10: loss nan, gradient norm nan: the last 3 steps were not finite (train.max_bad_steps = 3)"
    assert expected in result.output and "nothing saved since step 6" in result.output
    assert names(tmp_path / "run" / "checkpoints") == ["step-000003", "step-000006"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    result = run(config)  # whatever the reason was is gone
    assert "going on after step 6" in result.output and result.codes == [0]
    assert [record["step"] for record in learnt(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_all_processes_skip_when_one_has_a_bad_loss(run, config, tmp_path):
    prelude = BAD_LOSS.format(steps={4}, ranks={1}, factor="nan")
    result = run(config, "train.parallel=fsdp", "train.steps=6", processes=2, prelude=prelude)
    assert result.codes == [0, 0], result.output
    assert result.output.count("step 4: loss nan") == 2
    assert all(record["loss"] is not None for record in learnt(tmp_path / "run") if record["step"] != 4)


BAD_WEIGHTS = """
from palimpsest.train.loop import Run
inner = Run.update
def update(self, batches, valid):
    record = inner(self, batches, valid)
    if self.step == 6:
        self.core.norm.weight.data[0] = float("inf")
    return record
Run.update = update
"""


def test_weights_that_are_not_finite_are_never_saved(run, config, tmp_path):
    result = run(config, prelude=BAD_WEIGHTS)
    assert result.codes == [1]
    assert "weights after step 6 are not finite: no checkpoint is written" in result.output
    assert names(tmp_path / "run" / "checkpoints") == ["step-000003"]


# -- a full disk ------------------------------------------------------------------------------------------------------

FULL = """
import errno, os
from palimpsest.train.checkpoint import Checkpointer
sync, save = os.fsync, Checkpointer.save
def full(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def narrow(self, step, *rest):
    os.fsync = full if step in (6, 9) and rank == {rank} else sync
    try:
        return save(self, step, *rest)
    finally:
        os.fsync = sync
Checkpointer.save = narrow
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_loud_and_training_goes_on(run, config, tmp_path, processes):
    arguments = ["train.parallel=fsdp", "train.steps=11"] if processes == 2 else ["train.steps=11"]
    result = run(config, *arguments, processes=processes, prelude=FULL.format(rank=processes - 1))
    assert result.codes == [0] * processes, result.output
    assert result.output.count("NOT SAVED") == 2 and "CHECKPOINT OF STEP 6 NOT SAVED" in result.output
    assert "No space left on device" in result.output
    assert names(tmp_path / "run" / "checkpoints") == ["step-000003", "step-000011"]
    assert len(learnt(tmp_path / "run")) == 11
