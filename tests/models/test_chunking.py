"""A trained model at another chunk size."""

import pytest
import torch

from palimpsest.models import build
from palimpsest.models.chunking import at_chunk_size, chunk_sizes
from palimpsest.models.mixers.gates import MemoryGates

MEMORY = {"heads": 2, "expansion": 1}
TRAINED, ASKED = 8, 4
#: Mixers with a neural memory, and where the size of its chunks is said.
MIXERS = {
    "neural_memory": ({"kind": "neural_memory", "memory": MEMORY}, "memory.chunk_size"),
    "titans_mac": ({"kind": "titans_mac", "heads": 2, "segment": 8, "memory": MEMORY}, "memory.chunk_size"),
    "lact": ({"kind": "lact", "heads": 2, "window": 8, "memory": MEMORY}, "memory.chunk_size"),
    "mixture": (
        {"kind": "mixture", "rule": "neural", "heads": 2, "memories": 2, "top_k": 1, "memory": {"expansion": 1}},
        "memory.chunk_size",
    ),
    "tnt": ({"kind": "tnt", "memory": MEMORY | {"chunk_size": 16}, "local": {"expansion": 1}}, "local.chunk_size"),
}


def make(mixer: dict, key: str, size: int):
    torch.manual_seed(0)
    model = {"vocab_size": 16, "dim": 16, "layers": 2, "ffn_hidden": 16, "init_std": 0.3, "mixer": mixer}
    return build({"model": model}, **{f"model.mixer.{key}": size}).requires_grad_(False)


@pytest.mark.parametrize("name", MIXERS)
def test_only_the_chunks_change(name: str) -> None:
    """Against a model that was configured so, with the trained one's weights and sizes of steps."""
    mixer, key = MIXERS[name]
    model, wanted = make(mixer, key, TRAINED), make(mixer, key, ASKED)
    changed = at_chunk_size(model, ASKED)
    assert [x.data_ptr() for x in changed.parameters()] == [x.data_ptr() for x in model.parameters()]
    gates = zip(model.modules(), wanted.modules(), strict=True)
    for mine, theirs in [pair for pair in gates if isinstance(pair[0], MemoryGates)]:
        theirs.scale = mine.scale
    tokens = torch.randint(16, (2, 37), generator=torch.Generator().manual_seed(1))
    before, found = model(tokens).logits, changed(tokens).logits
    assert torch.equal(found, wanted(tokens).logits) and not torch.allclose(found, before, atol=1e-4)
    assert torch.equal(model(tokens).logits, before)  # the model itself is left as it was
    assert ASKED in chunk_sizes(changed) and TRAINED in chunk_sizes(model)


def test_a_state_belongs_to_its_chunk_size() -> None:
    mixer, key = MIXERS["neural_memory"]
    model = make(mixer, key, TRAINED)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    state = at_chunk_size(model, ASKED)(tokens).state
    with pytest.raises(ValueError, match=f"state was made by a model of configuration {model.fingerprint}@4"):
        model(tokens, state=state)
    model(tokens, state=at_chunk_size(model, TRAINED)(tokens).state)


def test_what_has_no_neural_memory_is_refused() -> None:
    mixture = MIXERS["mixture"][0] | {"rule": "gated_delta", "memory": None}
    for mixer, key in (({"kind": "attention", "heads": 2}, "heads"), (mixture, "heads")):
        model = make(mixer, key, 2)
        with pytest.raises(ValueError, match="chunk size was 4; it must be None for a model without"):
            at_chunk_size(model, 4)
        for part in model.modules():
            if hasattr(part, "rechunk"):
                with pytest.raises(ValueError, match="it must have a neural memory"):
                    part.rechunk(4)
    mixer, key = MIXERS["neural_memory"]
    with pytest.raises(ValueError, match="chunk size was 0; it must be at least 1"):
        at_chunk_size(make(mixer, key, 8), 0)
