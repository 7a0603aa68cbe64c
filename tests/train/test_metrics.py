"""metrics.jsonl, TensorBoard, the progress, and the peak that MFU is a share of."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from palimpsest.train import board, metrics
from palimpsest.train.metrics import MetricLog, Progress, read_metrics


def test_lines_after_the_restored_step_and_a_cut_off_line_are_dropped(tmp_path):
    log = MetricLog(tmp_path, tensorboard=False)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    log = MetricLog(tmp_path, step=3, tensorboard=False)
    log.write({"step": 4, "loss": 9.0})
    log.sync()
    log.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 1 / 3},
        {"step": 4, "loss": 9.0},
    ]


def test_numbers_survive_to_the_last_bit_and_what_is_not_finite_is_null(tmp_path):
    log = MetricLog(tmp_path, tensorboard=False)
    log.write({"step": 1, "loss": 0.1 + 0.2, "a": math.nan, "b": -math.inf})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1 + 0.2, "a": None, "b": None}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    log.close()


def test_a_broken_line_inside_is_named(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is not JSON"):
        read_metrics(tmp_path)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    for first, start in ((1, 0), (4, 3)):
        log = MetricLog(tmp_path, step=start)
        for step in range(first, 7):
            log.write({"step": step, "loss": step * (10.0 if start else 1.0), "note": "text"})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]
    assert events.Tags()["scalars"] == ["loss"]


def events_of(folder):
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


def test_texts_histograms_and_the_figure_of_a_task_are_on_tensorboard(tmp_path):
    log = MetricLog(tmp_path)
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0, "validation_accuracy/8x2": step / 4, "validation_accuracy/16x2": 0.1})
    log.board.text("sample", "def f():\n\treturn <b>", 2)
    numbers = torch.tensor([[0.5, math.nan, 0.25], [0.5, math.inf, 0.5]])
    log.board.histograms({"gate": numbers, "shares": torch.ones(1, 2, 3), "nothing": numbers[:, 1:2]}, 2)
    log.close()
    found = events_of(tmp_path)
    assert found.Tags()["histograms"] == ["gate"] and found.Tags()["images"] == ["accuracy by group"]
    histogram = found.Histograms("gate")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (4, 0.25, 0.5)
    (text,) = found.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    def f():\n        return <b>"
    pictures = found.Images("accuracy by group")
    assert [picture.step for picture in pictures] == [1, 2] and pictures[0].width == 640
    assert pictures[0].encoded_image_string != pictures[1].encoded_image_string


def test_the_figure_of_a_resumed_run_begins_at_its_beginning(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(board, "accuracy_figure", lambda history: drawn.append([dict(h) for h in history]))
    for start, steps in ((0, (1, 2, 3)), (2, (3,))):
        log = MetricLog(tmp_path, step=start)
        for step in steps:
            log.write({"step": step, "validation_accuracy/a": step + start / 10})
        log.close()
    assert drawn[-1] == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 3, "a": 3.2}]


def test_what_tensorboard_cannot_write_is_loud_once_and_the_numbers_go_on(tmp_path, caplog):
    log = MetricLog(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    log.board.events.add_scalar = full
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0, "lr": 0.1})
        log.board.text("sample", "x", step)
        log.sync()
    log.close()
    assert caplog.text.count("TENSORBOARD NOT WRITTEN") == 1 and "No space left on device" in caplog.text
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_sample_is_drawn_from_the_models_own_chances():
    class Model(torch.nn.Linear):
        def forward(self, tokens, state=None, return_state=None):
            seen.append(tokens.tolist())
            logits = torch.full((*tokens.shape, 4), -math.inf)
            logits[..., -1, (tokens[0, -1] + 1) % 4] = 0.0
            return SimpleNamespace(logits=logits, state=None)

    seen = []
    assert board.sample(Model(1, 1), [3, 1], 5, seed=7) == [2, 3, 0, 1, 2]
    assert seen == [[[3, 1]], [[2]], [[3]], [[0]], [[1]]]
    assert board.sample(Model(1, 1), [1], 3, seed=7, vocabulary=3) == [2, 0, 1]  # of no chances at all: 0


def test_a_listener_hears_each_record(tmp_path):
    heard = []
    log = MetricLog(tmp_path, tensorboard=False, listener=heard.append)
    log.write({"step": 1, "loss": math.inf})
    log.close()
    assert heard == [{"step": 1, "loss": None}]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "80")
    return now


def test_elsewhere_than_on_a_terminal_only_due_lines_are_written(clock):
    stream = io.StringIO()
    with Progress(100, 50, stream) as progress:
        clock[0] += 2.0
        progress.show({"step": 51, "loss": 2.5}, 1234.0, log=False)
        progress.show({"step": 60, "loss": 2.25}, 15_340.0, log=True)
        progress.say("validation")
    assert stream.getvalue() == "step 60/100  loss 2.2500  15.3k tok/s  ETA 0:08\nvalidation\n"


def test_on_a_terminal_a_bar_is_drawn_over_itself(clock):
    stream = Terminal()
    with Progress(100, 0, stream) as progress:
        for step in range(1, 101):
            clock[0] += 0.03
            progress.show({"step": step, "loss": 1.0}, 2e6, log=step % 10 == 0)
        progress.say("validation")
    text = stream.getvalue()
    frames = text.split("\r\x1b[K")
    assert 20 <= len(frames) <= 30, "at most ten a second"
    assert frames[-2].startswith("[━") and "100/100  loss 1.0000  2.0M tok/s  ETA 0:00" in frames[-2]
    assert frames[-1] == "validation\n\n"
    assert all(len(frame) <= 80 for frame in frames)
    assert "\n" not in "".join(frames[:-1])


def test_a_silent_one_writes_nothing(clock):
    stream = Terminal()
    with Progress(1, 0, stream, silent=True) as progress:
        progress.show({"step": 1, "loss": 1.0}, 1.0, log=True)
        progress.say("x")
    assert stream.getvalue() == ""


def test_times_read_as_times():
    assert [metrics._clock(seconds) for seconds in (0, 59.6, 3600, 90061)] == ["0:00", "1:00", "1:00:00", "25:01:01"]


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [
        ("NVIDIA H200", 67e12, 989.4e12),
        ("NVIDIA H100 PCIe", 51e12, 756e12),
        ("NVIDIA H100 80GB HBM3", 67e12, 989.4e12),
        ("NVIDIA GH200 480GB", 67e12, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 19.5e12, 312e12),
        ("NVIDIA L40S", 91.6e12, 362e12),
        ("NVIDIA L4", 30.3e12, 121e12),
        ("NVIDIA A10G", 35e12, 70e12),
        ("Some other GPU", None, None),
    ],
)
def test_the_peak_of_a_gpu_is_looked_up_by_its_name(monkeypatch, name, fp32, bf16):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda", 0)
    assert (metrics.peak_flops(device, "fp32"), metrics.peak_flops(device, "bf16")) == (fp32, bf16)


def test_the_peak_of_a_cpu_is_measured_and_memory_is_this_process():
    cpu = torch.device("cpu")
    assert 1e8 < metrics.peak_flops(cpu, "fp32") < 1e14
    assert 1e8 < metrics.peak_flops(cpu, "bf16") < 1e14
    assert 2**25 < metrics.peak_memory(cpu) < 2**42
