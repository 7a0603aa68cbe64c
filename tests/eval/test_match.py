"""Equal parameters for two architectures."""

import pytest

from palimpsest.eval.match import Match, match, nearest, parameters, size, solve
from palimpsest.models import build
from palimpsest.models.config import ConfigError

SHAPE = {"vocab_size": 256, "dim": 32, "layers": 2}
MEMORY = {"model": SHAPE | {"mixer": {"kind": "titans_mag", "heads": 2, "memory": {"heads": 2}}, "ffn_hidden": 32}}
PLAIN = {"model": SHAPE | {"mixer": {"kind": "window_attention", "heads": 2}}}


def test_the_count_is_that_of_the_real_model():
    assert parameters(MEMORY) == sum(p.numel() for p in build(MEMORY).parameters())


def test_the_baseline_has_as_many_within_a_percent():
    target = parameters(MEMORY)
    matched = match(PLAIN, target, multiple=1)
    assert abs(parameters(matched) - target) <= 0.01 * target
    assert matched["model"]["ffn_hidden"] > 96
    widths = [
        parameters({"model": matched["model"] | {"ffn_hidden": matched["model"]["ffn_hidden"] + d}}) for d in (-1, 1)
    ]
    assert all(abs(width - target) >= abs(parameters(matched) - target) for width in widths)


def test_a_target_out_of_reach_is_named():
    with pytest.raises(ValueError, match=r"model\.ffn_hidden = 8 gave .* within 1 % of 100"):
        match(PLAIN, 100)


def test_the_nearest_is_found_in_few_looks():
    for size_of in (lambda n: 7 * n + 5, lambda n: n * n, lambda n: n**3 + 1, lambda n: 10 * n + n % 3):
        for target in (1, 5, 12, 900, 12_345, 99_999):
            looks = []
            found = nearest(lambda n, of=size_of, seen=looks: seen.append(n) or of(n), target, 200, "n")
            best = min(abs(size_of(n) - target) for n in range(1, 201))
            assert abs(size_of(found) - target) == best and 1 <= found <= 200
            assert len(looks) <= 24, (target, looks)
    with pytest.raises(ConfigError, match="n changed nothing: 3 at 1 and at 2 of them"):
        nearest(lambda n: 3, 5, 200, "n")


@pytest.mark.parametrize(
    ("ask", "key", "multiple"),
    [
        ({"by": "parameters"}, "model.ffn_hidden", 8),
        ({"by": "flops"}, "model.ffn_hidden", 8),
        ({"by": "state_bytes"}, "model.dim", 4),  # two heads of even width
        ({"by": "parameters", "width": "model.mixer.memory.expansion"}, "model.mixer.memory.expansion", 1),
    ],
)
def test_each_size_is_matched_by_a_width(ask: dict, key: str, multiple: int):
    config = {"model": MEMORY["model"], "train": {"seq_len": 16}}
    place, last = (config["model"], key.split(".")[-1])
    wanted = 6 * multiple
    if "memory" in key:
        place = {"expansion": wanted, **config["model"]["mixer"]["memory"]}
        shape = config["model"] | {"mixer": config["model"]["mixer"] | {"memory": place}}
    else:
        shape = place | {last: wanted}
    target = size({**config, "model": shape}, ask["by"])
    solved, found = solve(config, Match(**ask, to=target), target)
    assert (found.width, found.value, found.off) == (key, wanted, 0.0)
    assert size(solved, ask["by"]) == target == found.reached


def test_flops_are_without_the_head_and_state_bytes_of_the_length():
    config = {"model": PLAIN["model"], "train": {"seq_len": 16}}
    model = build(config)
    assert size(config, "flops") == model.flops_per_token(16) - 6 * 32 * 256
    more = size({**config, "train": {"seq_len": 24}}, "state_bytes") - size(config, "state_bytes")
    assert more == 2 * 2 * 32 * 4 * 8  # k and v of eight more tokens in two layers
