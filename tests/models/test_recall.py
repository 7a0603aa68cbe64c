"""What memories return when asked later: against the memory's own definition, step by step."""

import pytest
import torch
from torch.nn import functional as F

from palimpsest.kernels import neural_memory_read
from palimpsest.models import build
from palimpsest.models.recall import recall

MODEL = {"vocab_size": 32, "dim": 16, "layers": 1, "ffn_hidden": 0}
MEMORY = {"heads": 2, "expansion": 1, "chunk_size": 8}
DEEP = {"expansion": 1, "chunk_size": 8}
MIXERS = {
    "neural": {"kind": "neural_memory", "memory": MEMORY},
    "mac": {"kind": "titans_mac", "heads": 2, "segment": 16, "memory": MEMORY},
    "mag": {"kind": "titans_mag", "heads": 2, "window": 8, "memory": MEMORY},
    "mal": {"kind": "titans_mal", "heads": 2, "window": 8, "memory": MEMORY},
    "delta": {"kind": "mixture", "heads": 2, "memories": 3, "top_k": 2, "rule": "delta"},
    "deep": {"kind": "mixture", "heads": 2, "memories": 3, "top_k": 1, "rule": "neural", "memory": DEEP},
}


def made(mixer):
    torch.manual_seed(0)
    return build({"model": MODEL | {"mixer": mixer}}).eval()


TOKENS = torch.randint(0, 32, (1, 37), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MIXERS)
def test_marks_are_what_a_shorter_text_leaves_behind(name):
    """After n tokens a memory knows nothing of the rest: reading n alone gives the same cosines of its tokens."""
    model = made(MIXERS[name])
    (found,) = recall(model, TOKENS, [0, 5, 16, 37]).values()
    assert found.shape == (4, 37) and found.dtype == torch.float32
    for row, mark in ((1, 5), (2, 16)):
        (alone,) = recall(model, TOKENS[:, :mark], [mark]).values()
        # Another split of float32 sums.
        assert (found[row, :mark] - alone[0]).abs().max() <= 1e-4
    assert (found[1, :5] - found[0, :5]).abs().max() > 1e-3 and (found[3] - found[2]).abs().max() > 1e-4


def test_a_neural_memory_answers_by_its_state():
    model = made(MIXERS["neural"])
    layer, seen = model.blocks[0].mixer, []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS[:, :21], return_state=False)
        state = layer(seen[0])[1]["memory"]
        handle.remove()
        _, k, v, _, _ = layer._write_inputs(seen[0], None, None, False)
        o = neural_memory_read(k, weights=state, spec=layer.spec, norm=layer.norm)
    expected = F.cosine_similarity(o, v, dim=-1).mean(-1)[0]
    found = recall(model, TOKENS[:, :21], [3, 21])["layer.0"]
    assert (found[1] - expected).abs().max() <= 1e-5


def test_a_delta_memory_with_one_place_returns_what_it_was_just_given():
    """The last token that a delta rule wrote with β is answered with (1 − β) of the old and β of its value."""
    model = made(MIXERS["delta"])
    layer = model.blocks[0].mixer
    found = recall(model, TOKENS, [*range(38)])["layer.0"]
    fresh, before = found[1:].diagonal(), found[:-1].diagonal()
    assert (fresh > before).float().mean() > 0.9 and layer.mixer.rule == "delta"
    assert (found[0] == 0).all(), "an empty memory answers nothing"


def test_models_without_such_a_memory_have_none_and_bad_input_is_named():
    attention = made({"kind": "attention", "heads": 2})
    assert recall(attention, TOKENS, [1]) == {}
    with pytest.raises(ValueError, match="tokens was of 2 rows; it must be one"):
        recall(attention, TOKENS.expand(2, -1), [1])
    for marks in ([3, 2], [38], [-1]):
        with pytest.raises(ValueError, match=r"marks was .*; it must ascend in \[0, 37\]"):
            recall(attention, TOKENS, marks)
