"""Chunks cut at surprises: against the definitions in plain loops, streaming, and the layer that reads them."""

import math
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from torch import Tensor

from palimpsest.models.borders import Chunk, Cutter, division, surprise
from palimpsest.models.config import ConfigError, ModelConfig, validate
from palimpsest.models.mixers import make_mixer

from .mixers import HCAM, REGISTRY, small_mixer, small_model, tokens
from .test_chunk_memory import block_union, hcam

BOUND = 1e-10


def modularity(keys: Tensor, b: int) -> float:
    length = len(keys)
    near = [[0.0] * length for _ in range(length)]
    for i in range(length):
        for j in range(length):
            if i != j:
                near[i][j] = (1 + float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm())) / 2
    degree = [sum(row) for row in near]
    total = sum(degree)
    together = [(i, j) for i in range(length) for j in range(length) if (i < b) == (j < b)]
    return sum(near[i][j] - degree[i] * degree[j] / total for i, j in together) / total


def plain_surprise(keys: Tensor, window: int) -> list[float]:
    found = []
    for t in range(len(keys)):
        before = keys[max(0, t - window) : t]
        if t < 2:
            found.append(0.0)
            continue
        mean = before.mean(0)
        variance = float((before - mean).square().mean()) + 1e-6
        found.append((float((keys[t] - mean).square().mean()) / variance + math.log(variance)) / 2)
    return found


def plain_cut(cutter: Cutter, news: list[float], keys: Tensor) -> list[Chunk]:
    start, found = 0, []
    for t in range(len(news)):
        before = news[max(0, t - cutter.window) : t]
        full = t - start == cutter.most
        if t - start >= cutter.least and (full or news[t] > fmean(before) + cutter.gamma * pstdev(before)):
            options = range(start + cutter.least, t + 1)
            end = max(options, key=lambda b: (modularity(keys[start : t + 1], b - start), b))
            found.append(Chunk(start, end, t))
            start = end
    return found


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_division_is_of_the_largest_modularity() -> None:
    for seed in range(5):
        keys = draw(9, 3, seed=seed)
        for least in (1, 3):
            best = max(range(least, 9), key=lambda b: modularity(keys, b))
            assert division(keys, least) == best
    two = torch.cat([draw(1, 4) + 0.01 * draw(4, 4), draw(1, 4, seed=1) + 0.01 * draw(7, 4)])
    assert division(two) == 4
    assert division(torch.ones(2, 3), 1) == 1


def test_surprise_is_its_definition() -> None:
    keys = draw(2, 15, 4)
    position = torch.arange(15).expand(2, 15)
    found = surprise(keys, torch.zeros(2, 5, 4), position)
    assert (found - torch.tensor([plain_surprise(row, 5) for row in keys], dtype=found.dtype)).abs().max() <= 1e-12
    later = surprise(keys[:, 9:], keys[:, 4:9], position[:, 9:])
    assert torch.equal(later, found[:, 9:])
    few = surprise(keys[:, 3:], torch.cat([draw(2, 2, 4), keys[:, :3]], 1), position[:, 3:])
    assert torch.allclose(few, found[:, 3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 9.0])
def test_chunks_are_cut_by_the_rule(gamma: float) -> None:
    cutter, keys = Cutter(gamma, 6, 2, 7), draw(60, 3)
    news = plain_surprise(keys, 6)
    chunks = cutter.cut(news, keys)
    assert chunks == plain_cut(cutter, news, keys)
    assert [chunk.start for chunk in chunks] == [0, *(chunk.end for chunk in chunks[:-1])]
    for chunk in chunks:
        assert 2 <= chunk.end - chunk.start <= 7 and chunk.end <= chunk.closed <= chunk.start + 7
    assert len(chunks) > 5 and (gamma < 9 or all(chunk.closed == chunk.start + 7 for chunk in chunks[1:]))
    assert gamma == 9 or any(chunk.closed < chunk.start + 7 for chunk in chunks)


@pytest.mark.parametrize("at", [1, 7, 20, 33])
def test_a_chunk_is_final(at: int) -> None:
    """The chunks of a sequence's beginning are the first of the whole one's, and a stream's are the same."""
    cutter, keys = Cutter(0.5, 6, 2, 7), draw(40, 3)
    news = plain_surprise(keys, 6)
    whole = cutter.cut(news, keys)
    first = cutter.cut(news[:at], keys[:at])
    assert first == [chunk for chunk in whole if chunk.closed < at]
    start = first[-1].end if first else 0
    rest = cutter.cut(news[at:], keys[start:], at, start, news[max(0, at - 6) : at])
    assert first + rest == whole


def test_a_new_topic_begins_a_chunk() -> None:
    topics = torch.cat([3 * draw(1, 8, seed=i) + 0.1 * draw(10, 8, seed=9 + i) for i in range(4)])
    found = Cutter(2.0, 8, 4, 16).cut(
        surprise(topics[None], torch.zeros(1, 8, 8), torch.arange(40)[None])[0].tolist(), topics
    )
    assert [chunk.end for chunk in found] == [10, 20, 30]


def test_the_layer_is_its_equations() -> None:
    mixer: Any = small_mixer("hcam, cut").requires_grad_(False)
    cutter, x = mixer.store.cutter, tokens(1, 33, seed=3)
    seen = []

    def cut(keys: Tensor) -> list[tuple[int, int, int]]:
        chunks = plain_cut(cutter, plain_surprise(keys, cutter.window), keys)
        seen.extend(chunks)
        return [(chunk.start, chunk.end, chunk.closed) for chunk in chunks]

    expected, weights = hcam(mixer, x[0], cut=cut)
    assert {chunk.end - chunk.start for chunk in seen} > {2} and any(chunk.closed > chunk.end for chunk in seen)
    assert (mixer(x)[0][0] - expected).abs().max() <= BOUND
    assert (mixer.observe(x)["chunks"][0, :, : len(seen)] - weights).abs().max() <= BOUND
    assert set(mixer.diagnose(x)) == {"entropy", "strength"}


def test_a_union_is_its_equations() -> None:
    mixer = {"kind": "block_union", "heads": 2, "chunk_size": 5, "top_k": 2, "cut": REGISTRY["hcam, cut"]["cut"]}
    config = validate(ModelConfig, small_model(mixer))
    torch.manual_seed(0)
    layer: Any = make_mixer(config, config.mixer_of(0)).double().requires_grad_(False)
    cutter, x = layer.store.cutter, tokens(1, 33)

    def cut(keys: Tensor) -> list[tuple[int, int, int]]:
        return [(c.start, c.end, c.closed) for c in plain_cut(cutter, plain_surprise(keys, cutter.window), keys)]

    assert (layer(x)[0][0] - block_union(layer, x[0], cut=cut)[0]).abs().max() <= BOUND


def test_a_stream_has_the_chunks_of_the_whole() -> None:
    """With a window that is longer than what came before the split."""
    torch.manual_seed(0)
    cut = {"gamma": 0.4, "window": 12, "least": 1}
    config = validate(ModelConfig, small_model({**HCAM, "chunk_size": 6, "cut": cut}))
    mixer: Any = make_mixer(config, config.mixer_of(0)).double().requires_grad_(False)
    x, seen = tokens(4, 30), []
    handle = mixer.keep.register_forward_hook(lambda module, args, output: seen.append(output))
    whole = mixer(x)[1]["memory"]["closed"]
    handle.remove()
    for row, keys in zip(whole, seen[0], strict=True):
        chunks = plain_cut(mixer.store.cutter, plain_surprise(keys, 12), keys)
        assert row[row > 0].tolist() == [chunk.closed for chunk in chunks]
    for at in range(1, 14):
        state = None
        for part in x.tensor_split([at, at + 3], 1):
            state = mixer(part, state)[1]
        assert torch.equal(state["memory"]["closed"], whole)


def test_a_union_of_all_chunks_is_full_attention() -> None:
    keys = {"heads": 4, "kv_heads": 2}
    cut = {"gamma": 0.2, "window": 4, "least": 2}
    configs = [
        {"kind": "block_union", **keys, "chunk_size": 5, "top_k": 12, "cut": cut},
        {"kind": "attention", **keys},
    ]
    made = [validate(ModelConfig, small_model(mixer)) for mixer in configs]
    union, full = (make_mixer(config, config.mixer_of(0)).double() for config in made)
    full.load_state_dict({f"core.{k}" if k[0] == "q" else k: v for k, v in union.state_dict().items()})
    x = tokens(2, 23)
    assert (union(x)[0] - full(x)[0]).abs().max() <= BOUND
    _, state = union(x[:, :9])
    assert (union(x[:, 9:], state)[0] - full(x)[0][:, 9:]).abs().max() <= BOUND


def test_configurations_that_cannot_be() -> None:
    cut = REGISTRY["hcam, cut"]["cut"]
    for keys, words in (
        ({"cut": {"least": 4}}, "least of cut was 4; it must be at most chunk_size = 3"),
        ({"cut": cut, "share": 3}, "share was 3; with cut it must be 1"),
        ({"cut": cut, "bank": {"capacity": 3}}, "bank was a section; with cut it must be null"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(ModelConfig, small_model({**HCAM, **keys}))
