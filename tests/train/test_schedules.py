"""Schedules by value, at their borders, and as keys of a config."""

import math
from itertools import pairwise

import pytest

from palimpsest.models.config import ConfigError
from palimpsest.train import schedules
from palimpsest.train.config import read_config


def rate(step, **changes):
    options = {"peak": 2.0, "steps": 100, "warmup_steps": 10, "schedule": "cosine", "min_ratio": 0.1}
    return schedules.learning_rate(step, **(options | changes))


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(schedule):
    assert [rate(step, schedule=schedule) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(1, schedule=schedule, warmup_steps=0) == pytest.approx(2.0, rel=1e-3)


def test_cosine_falls_to_its_floor_at_the_last_update():
    assert rate(55) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half-way
    assert rate(100) == pytest.approx(0.2)
    assert rate(32.5) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    falling = [rate(step) for step in range(10, 101)]
    assert falling == sorted(falling, reverse=True)


def test_wsd_is_flat_then_linear():
    wsd = {"schedule": "wsd", "decay_fraction": 0.2}
    assert {rate(step, **wsd) for step in range(10, 81)} == {2.0}
    assert [rate(step, **wsd) for step in (90, 100)] == pytest.approx([2.0 * 0.55, 0.2])


def test_constant_is_constant():
    assert {rate(step, schedule="constant") for step in range(10, 101)} == {2.0}


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(
        ValueError, match=r"schedule was 'cosin'; it must be one of \['cosine', 'wsd', 'constant', 'infinite'\]"
    ):
        rate(1, schedule="cosin")


INFINITE = {
    "schedule": "infinite",
    "cooldown_steps": 30,
    "constant_ratio": 0.4,
    "min_ratio": 0.1,
    "decay_fraction": 0.2,
}


def test_infinite_cools_down_stays_and_anneals():
    """Half a cosine from 2 to 0.8 over updates 10 to 40; 0.8 to update 80; exponential to 0.2 at update 100."""
    assert rate(10, **INFINITE) == 2.0
    assert rate(25, **INFINITE) == pytest.approx(1.4)  # half-way of both the updates and the cosine
    assert rate(20, **INFINITE) == pytest.approx(0.8 + 1.2 * (1 + math.cos(math.pi / 3)) / 2)
    assert [rate(step, **INFINITE) for step in (40, 60, 80)] == pytest.approx([0.8] * 3)
    assert rate(90, **INFINITE) == pytest.approx(math.sqrt(0.8 * 0.2))  # the geometric mean of the ends
    assert rate(100, **INFINITE) == pytest.approx(0.2)
    falling = [rate(step, **INFINITE) for step in range(10, 101)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(falling))


def test_before_its_anneal_infinite_knows_nothing_of_the_end():
    assert [rate(n, **INFINITE) for n in range(81)] == [rate(n, **INFINITE, steps=1000) for n in range(81)]
    assert {round(rate(n, **INFINITE | {"decay_fraction": 0.0}), 12) for n in range(40, 101)} == {0.8}


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_no_schedule_jumps(schedule):
    """Between two of 1000 updates the rate moves by no more than the steepest stretch asks for: 1/100 of the peak's way
    in warm-up, and for the anneal ln 4 / 200 of what it is."""
    options = INFINITE | {"schedule": schedule, "cooldown_steps": 300, "steps": 1000, "warmup_steps": 100}
    rates = [rate(step, **options) for step in range(1001)]
    assert max(abs(b - a) for a, b in pairwise(rates)) <= 2.0 / 100 * (1 + 1e-9)


MODEL = {"vocab_size": 256, "dim": 16, "layers": 1, "mixer": {"kind": "attention", "heads": 2}}
KEYS = {"schedule": "infinite", "steps": 100, "warmup_steps": 10, "cooldown_steps": 30, "constant_lr_ratio": 0.4}


def read(**train):
    return read_config({"name": "x", "model": MODEL, "train": train}).train


def test_a_config_says_the_same():
    settings = read(**KEYS, lr=2.0)
    assert [schedules.rate_of(settings, n) for n in range(101)] == [rate(n, **INFINITE) for n in range(101)]
    assert schedules.rate_of(read(steps=100, warmup_steps=10, lr=2.0), 50) == rate(50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cooldown_steps": None}, "train.cooldown_steps was None; it must be given with train.schedule infinite"),
        (
            {"constant_lr_ratio": None},
            "train.constant_lr_ratio was None; it must be given with train.schedule infinite",
        ),
        ({"schedule": "wsd"}, "train.cooldown_steps was 30; it must be null without train.schedule infinite"),
        ({"min_lr_ratio": 0.0}, "train.min_lr_ratio was 0.0; with train.schedule infinite it must be more than 0"),
        ({"min_lr_ratio": 0.5}, "train.min_lr_ratio was 0.5; .* at most train.constant_lr_ratio = 0.4"),
        ({"cooldown_steps": 71}, "train.cooldown_steps was 71; .* it must be at most train.steps = 100 in all"),
        ({"constant_lr_ratio": 1.5}, "train.constant_lr_ratio was 1.5; it must be less than or equal to 1"),
    ],
)
def test_keys_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        read(**KEYS | changes)


@pytest.mark.parametrize(
    ("schedule", "keys"),
    [("constant", ("min_lr_ratio", "decay_fraction")), ("cosine", ("decay_fraction",)), ("wsd", ())],
)
def test_what_a_schedule_does_not_use_is_refused(schedule, keys):
    for key in ("min_lr_ratio", "decay_fraction"):
        if key not in keys:
            read(schedule=schedule, **{key: 0.3})
            continue
        with pytest.raises(
            ConfigError, match=f"train.{key} was 0.3; it must be left at .* train.schedule {schedule}, whi"
        ):
            read(schedule=schedule, **{key: 0.3})
