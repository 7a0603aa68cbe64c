"""HCAM and block attention: against their equations in plain loops, what a decoding step touches, what is reported.

Bound: 1e-10 on absolute differences of values of order 1, in float64.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.models import build
from palimpsest.models.config import ConfigError, ModelConfig, validate
from palimpsest.models.mixers import make_mixer
from palimpsest.models.mixers.block_union import BlockUnionAttention
from palimpsest.models.mixers.chunk_store import laid
from palimpsest.models.mixers.hcam import HierarchicalMemory
from palimpsest.models.mixers.scorers import Landmark, Mean, Representative, Scorer, StridedMLP

from .mixers import DIM, HCAM, REGISTRY, small_mixer, small_model, tokens
from .test_variants import attend, norm, rotated

BOUND = 1e-10
Chunks = list[tuple[int, int, int]]  # first token, the one after the last, and the one from which on it is read
CHUNKED = [name for name, mixer in REGISTRY.items() if mixer["kind"] in ("hcam", "block_union")]
EVEN = [name for name in CHUNKED if "cut" not in REGISTRY[name]]
UNBANKED = [name for name in EVEN if "bank" not in REGISTRY[name]]
every_chunked = pytest.mark.parametrize("name", CHUNKED)


def summary(scorer: Scorer, keys: Tensor, queries: Tensor) -> Tensor:
    """The summary [E] of one chunk of one head, keys and queries [C, E], h the head's number where it matters."""
    count = len(keys)
    if isinstance(scorer, Representative):
        received = [sum(float(queries[j] @ keys[m]) for j in range(m, count)) / (count - m) for m in range(count)]
        best = sorted(range(count), key=lambda m: (-received[m], m))[: scorer.tokens]
        return torch.stack([keys[m] for m in best]).mean(0)
    if isinstance(scorer, StridedMLP):
        values = []
        for begin in range(0, count - scorer.width + 1, scorer.stride):
            window = keys[begin : begin + scorer.width]
            inner = F.linear((window + scorer.positions).flatten(), scorer.enter.weight)
            values.append(window.mean(0) + F.linear(inner * torch.sigmoid(inner), scorer.leave.weight))
        return torch.stack(values).mean(0)
    return keys.mean(0)


def read_by_landmark(token: Tensor, keys: Tensor) -> Tensor:
    weight = torch.stack([token @ key / math.sqrt(len(key)) for key in keys]).softmax(0)
    return weight @ keys


def even(size: int, length: int) -> Chunks:
    return [(end - size, end, end) for end in range(size, length + 1, size)]


def summaries(scorer: Scorer, keys: Tensor, queries: Tensor, chunks: Chunks) -> Tensor:
    """[chunks, Hs, E] of keys and queries [T, Hs, E]."""
    rows = []
    for begin, end, _ in chunks:
        part = slice(begin, end)
        heads = range(keys.shape[1])
        if isinstance(scorer, Landmark):
            rows.append([read_by_landmark(scorer.token[h], keys[part, h]) for h in heads])
        else:
            rows.append([summary(scorer, keys[part, h], queries[part, h]) for h in heads])
    return torch.stack([torch.stack(row) for row in rows])


def chosen(store: Any, chunks: Chunks, choosing: Tensor, known: Tensor, t: int, s: int, kept: int = 99) -> list[int]:
    """Chunks that token t reads: the best of those that its run's first token may read, of the last ``kept``."""
    leader = t // store.share * store.share
    ready = sum(closed <= leader for _, _, closed in chunks)
    score = {i: float(choosing[leader, s] @ known[i, s]) for i in range(max(0, ready - kept), ready)}
    return sorted(score, key=lambda i: (-score[i], i))[: store.top_k]


def ages(count: int) -> Tensor:
    rate = torch.tensor([10000.0 ** (-2 * i / DIM) for i in range(DIM // 2)], dtype=torch.float64)
    angle = torch.stack([rate * (count - 1 - j) for j in range(count)])
    return torch.cat([angle.sin(), angle.cos()], 1)


def hcam(
    mixer: HierarchicalMemory, x: Tensor, kept: int = 99, cut: Callable[[Tensor], Chunks] | None = None
) -> tuple[Tensor, Tensor]:
    """What the layer makes of x [T, dim], and the weights of the chunks [T, Nc]; ``cut`` makes chunks of keys."""
    core, store, config = mixer.local, mixer.store, mixer.mixer
    fixed = [] if core.persistent is None else [(token, None) for token in core.persistent.tokens]
    local = []
    for t, token in enumerate(x):
        seen = fixed + [(x[j], j) for j in range(max(0, t - config.window + 1), t + 1)]
        local.append(F.linear(attend(core, token, t, seen), mixer.local_out.weight))
    z = torch.stack([norm(x[t] + local[t], mixer.norm) for t in range(len(x))])
    asked = F.linear(z, mixer.ask.weight)
    q, choosing = asked[:, :DIM].unflatten(-1, (mixer.heads, -1)), asked[:, DIM:].unflatten(-1, (config.selectors, -1))
    keys = F.linear(z, mixer.keep.weight).unflatten(-1, (config.selectors, -1))
    chunks = even(store.chunk_size, len(x)) if cut is None else cut(keys.flatten(1))
    known = summaries(store.scorer, keys, choosing, chunks)
    outputs, counted = [], torch.zeros(len(x), len(chunks), dtype=x.dtype)
    for t in range(len(x)):
        heads = []
        for h in range(mixer.heads):
            s, g = h * config.selectors // mixer.heads, h * mixer.kv_heads // mixer.heads
            ids = chosen(store, chunks, choosing, known, t, s, kept)
            m = torch.zeros(mixer.width, dtype=x.dtype)
            scale = math.sqrt(choosing.shape[-1])
            share = torch.stack([choosing[t, s] @ known[i, s] / scale for i in ids]).softmax(0) if ids else []
            for weight, i in zip(share, ids, strict=True):
                begin, end, _ = chunks[i]
                kv = F.linear(z[begin:end] + ages(end - begin), mixer.kv.weight).unflatten(-1, (2, -1, mixer.width))
                inside = (kv[:, 0, g] @ q[t, h] / math.sqrt(mixer.width)).softmax(0)
                m = m + weight * (inside @ kv[:, 1, g])
                counted[t, i] += weight / mixer.heads
            heads.append(m * torch.sigmoid(mixer.gate.weight[h] @ z[t]) if mixer.gate is not None else m)
        outputs.append(local[t] + F.linear(torch.cat(heads), mixer.out.weight))
    return torch.stack(outputs), counted


def block_union(
    mixer: BlockUnionAttention, x: Tensor, cut: Callable[[Tensor], Chunks] | None = None
) -> tuple[Tensor, Tensor]:
    """As of :func:`hcam`; of a union, each chosen chunk counts the same."""
    store, heads, shared = mixer.store, mixer.heads, mixer.kv_heads
    q, k, v = F.linear(x, mixer.qkv.weight).unflatten(-1, (-1, mixer.width)).split([heads, shared, shared], 1)
    group = heads // shared
    choosing = torch.stack([q[:, g * group : (g + 1) * group].mean(1) for g in range(shared)], 1)
    chunks = even(store.chunk_size, len(x)) if cut is None else cut(k.flatten(1))
    known = summaries(store.scorer, k, choosing, chunks)
    core: Any = SimpleNamespace(rope=mixer.mixer.rope, base=mixer.base)
    outputs, counted = [], torch.zeros(len(x), len(chunks), dtype=x.dtype)
    for t in range(len(x)):
        leader = t // store.share * store.share
        own = max((end for _, end, closed in chunks if closed <= leader), default=0)
        parts = []
        for h in range(heads):
            g = h // group
            ids = chosen(store, chunks, choosing, known, t, g)
            counted[t, ids] += 1 / max(1, len(ids)) / heads
            places = [j for i in ids for j in range(*chunks[i][:2])] + list(range(own, t + 1))
            query = rotated(q[t], t, core)[h]
            scores = torch.stack([rotated(k[j], j, core)[g] @ query for j in places]) / math.sqrt(mixer.width)
            parts.append(scores.softmax(0) @ torch.stack([v[j, g] for j in places]))
        outputs.append(F.linear(torch.cat(parts), mixer.out.weight))
    return torch.stack(outputs), counted


@pytest.mark.parametrize("name", EVEN)
def test_the_layer_is_its_equations(name: str) -> None:
    mixer: Any = small_mixer(name).requires_grad_(False)
    for parameter in mixer.parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    mixer.store.branching = None  # a choice down the tree is held to its own equations with the operation
    x = tokens(1, 17)
    plain = hcam if REGISTRY[name]["kind"] == "hcam" else block_union
    expected, weights = plain(mixer, x[0])
    assert expected.shape == (17, DIM)
    assert (mixer(x, return_state=False)[0][0] - expected).abs().max() <= BOUND
    shares = mixer.observe(x)["chunks"][0]
    assert (shares[:, : weights.shape[1]] - weights).abs().max() <= BOUND and not shares[:, weights.shape[1] :].any()


@every_chunked
def test_packed_documents_in_training(name: str) -> None:
    """Without a state packed documents take a way of their own: that of each document alone, gradients too."""
    mixer, x = small_mixer(name), tokens(1, 23)
    cu_seqlens = torch.tensor([0, 4, 4, 5, 16, 23], dtype=torch.int32)
    alone = torch.cat([mixer(x[:, a:b], return_state=False)[0] for a, b in ((0, 4), (4, 5), (5, 16), (16, 23))], 1)
    packed, state = mixer(x, None, cu_seqlens, False)
    assert state is None and (packed - alone).abs().max() <= BOUND
    grads = [torch.autograd.grad(y.sin().sum(), list(mixer.parameters())) for y in (packed, alone)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= BOUND * max(1.0, b.abs().max().item())


def test_choosing_among_all_is_full_attention() -> None:
    keys = {"heads": 4, "kv_heads": 2}
    configs = [{"kind": "block_union", **keys, "chunk_size": 3, "top_k": 8}, {"kind": "attention", **keys}]
    made = [validate(ModelConfig, small_model(mixer)) for mixer in configs]
    union, full = (make_mixer(config, config.mixer_of(0)).double() for config in made)
    full.load_state_dict({f"core.{k}" if k[0] == "q" else k: v for k, v in union.state_dict().items()})
    x = tokens(2, 23)
    assert (union(x)[0] - full(x)[0]).abs().max() <= BOUND


def test_a_tree_that_covers_all_chooses_the_same() -> None:
    x, outputs = tokens(2, 23), []
    for branching in (None, 2):
        torch.manual_seed(0)
        config = validate(ModelConfig, small_model({**HCAM, "top_k": 8, "branching": branching}))
        outputs.append(make_mixer(config, config.mixer_of(0)).double()(x)[0])
    assert (outputs[0] - outputs[1]).abs().max() <= BOUND


SCORERS = {
    "mean": Mean,
    "representative": lambda: Representative(2),
    "strided_mlp": lambda: StridedMLP(3, 2, 4, 0.5),
    "landmark": lambda: Landmark(2, 4),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_sees_the_tokens_that_are_there(name: str) -> None:
    """What lies behind the count changes nothing; no token, no summary; chunks do not see each other."""
    torch.manual_seed(0)
    scorer = SCORERS[name]().double()
    draw = torch.Generator().manual_seed(1)
    keys, queries = (torch.randn(3, 6, 7, 2, 4, dtype=torch.float64, generator=draw) for _ in range(2))
    count = torch.tensor([0, 1, 2, 3, 5, 7]).expand(3, 6)
    found = scorer(keys, queries, count)
    assert found.shape == (3, 6, 2, 4) and not found[:, 0].any()
    for i, size in enumerate(count[0].tolist()):
        if size >= 3 or (size and name != "strided_mlp"):
            assert torch.allclose(found[:, i], scorer(keys[:, i, :size], queries[:, i, :size]), rtol=0, atol=1e-14)
    moved = torch.where(torch.arange(7)[:, None, None] < count[..., None, None, None], keys, keys * 9)
    assert torch.equal(scorer(moved, queries, count), found)
    keys[1] += 1
    again = scorer(keys, queries, count)
    assert torch.equal(again[[0, 2]], found[[0, 2]]) and not torch.equal(again[1], found[1])


def test_representatives_of_equal_keys_are_the_first() -> None:
    keys = torch.ones(5, 1, 2, dtype=torch.float64)
    keys[:, 0, 1] = torch.arange(5)
    asked = torch.zeros_like(keys)
    assert Representative(2)(keys, asked).tolist() == [[1.0, 0.5]]


@pytest.mark.parametrize("name", EVEN)
def test_a_step_computes_its_own_token_alone(name: str) -> None:
    """Every linear map sees one token of each row, and the scorer the one chunk that it may complete."""
    mixer: Any = small_mixer(name)
    state, seen = mixer(tokens(2, 20))[1], []
    scored = []
    mixer.store.scorer.register_forward_hook(lambda module, args, output: scored.append(args[0].shape[:3]))
    for module in mixer.modules():
        if isinstance(module, nn.Linear) and module not in mixer.store.scorer.modules():
            module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2]))
    mixer(tokens(2, 1), state)
    assert seen and set(seen) == {(2, 1)}
    size = mixer.store.chunk_size
    assert scored == ([(2, 1, size)] if REGISTRY[name].get("bank") is None else [(2, size, mixer.store.choosing[0])])


@pytest.mark.parametrize("name", UNBANKED)
def test_no_value_is_read_by_the_host(name: str) -> None:
    """Tensors on meta have no values: whoever asks for one fails."""
    with torch.device("meta"):
        config = validate(ModelConfig, small_model(REGISTRY[name]))
        layer = make_mixer(config, config.mixer_of(0))
        x = torch.empty(2, 16, DIM, requires_grad=True)
        y, state = layer(x)
        y.sum().backward()
        layer(torch.empty(2, 1, DIM), state)
        borders = torch.empty(4, dtype=torch.int32)
        layer(x[:1], None, borders, False)
        _, state = layer(x[:1], None, borders)
        layer(x[:1], state, borders)
    assert x.grad is not None and x.grad.shape == x.shape


def test_compiled_is_eager() -> None:
    layer, x = small_mixer("hcam, shared"), tokens(2, 11)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert (run(x, return_state=False)[0] - layer(x)[0]).abs().max() <= 1e-12
    state = layer(x)[1]
    assert (run(x[:, :3], state)[0] - layer(x[:, :3], state)[0]).abs().max() <= 1e-12


def test_detached_memory_teaches_only_by_its_maps() -> None:
    """No gradient into what is remembered; the maps that remember and choose still have one."""
    x = tokens(1, 20).requires_grad_()
    for detach in (False, True):
        config = validate(ModelConfig, small_model({**HCAM, "detach": detach}))
        torch.manual_seed(0)
        mixer: Any = make_mixer(config, config.mixer_of(0)).double()
        y = mixer(x)[0]
        (grad,) = torch.autograd.grad(y[:, 19].square().sum(), x, retain_graph=True)
        assert bool(grad[:, :16].any()) == (not detach)  # behind the window of 4
        y.square().sum().backward()
        for part in (mixer.kv, mixer.keep, mixer.ask):
            assert part.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", EVEN)
def test_what_is_reported(name: str) -> None:
    mixer: Any = small_mixer(name)
    x = tokens(2, 19)
    seen, numbers = mixer.observe(x), mixer.diagnose(x)
    size, share = mixer.store.chunk_size, mixer.store.share
    chunks = seen["chunks"]
    assert chunks.shape == (2, 19, -(-19 // size)) and set(numbers) == set(seen) - {"chunks"}
    for t in range(19):
        ready = t // share * share // size
        total = chunks[:, t].sum(-1)
        assert torch.allclose(total, torch.full_like(total, float(ready > 0))) and not chunks[:, t, ready:].any()
        assert (seen["distance"][:, t] >= size / 2).all() == (ready > 0)
    assert numbers["distance"].item() > size / 2
    read = mixer.store.top_k * mixer.store.choosing[0]  # chunks, at most: heads choose for themselves
    assert 0 < numbers["entropy"].item() < math.log(read) + 1e-9 and numbers.get("strength", torch.ones(1)).item() > 0


@pytest.mark.parametrize("name", CHUNKED)
def test_under_autocast(name: str) -> None:
    """bf16 products, float32 parameters: close to float32 (bf16 has 8 bits), and splits and resets still work."""
    torch.manual_seed(0)
    model = build({"model": small_model(REGISTRY[name], init_std=0.05)})
    t = torch.randint(0, 11, (2, 17), generator=torch.Generator().manual_seed(0))
    exact = model(t, targets=t).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(t, targets=t).loss
        state = model(t[:, :9]).state.reset([1], model.init_state(1))
        model(t[:, 9:], state)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2**-6)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"top_k": 1}, "top_k was 1; it must be at least 2: the weight of a lone chunk"),
        ({"selectors": 3}, "selectors was 3; it must divide heads = 2"),
        ({"branching": 1}, "mixer.branching was 1"),
        ({"scorer": {"kind": "strided_mlp", "width": 4}}, "width of scorer was 4; it must be at most chunk_size = 3"),
        ({"scorer": {"kind": "men"}}, "mixer.scorer.kind was 'men'"),
        ({"chunksize": 3}, "did you mean 'chunk_size'"),
        ({"kind": "block_union", "scorer": {"kind": "landmark"}, "window": 3}, "unknown key 'window'"),
        ({"heads": 3}, "heads of mixer hcam was 3; it must divide dim = 8"),
    ],
)
def test_configurations_that_cannot_be(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(ModelConfig, small_model({**HCAM, **keys}))


def test_a_union_takes_no_scorer_that_learns() -> None:
    with pytest.raises(ConfigError, match="kind of scorer was 'landmark'; it must be mean or representative"):
        validate(ModelConfig, small_model({"kind": "block_union", "heads": 2, "scorer": {"kind": "landmark"}}))


def test_rows_laid_side_by_side() -> None:
    x, cache = torch.arange(1, 8)[:, None], torch.tensor([[[91], [92], [93]], [[81], [82], [83]]])
    rows = laid(x, torch.tensor([0, 4]), torch.tensor([3, 1]), 5, torch.tensor([1, 3]), cache)
    assert rows[..., 0].tolist() == [[91, 1, 2, 3, 0], [81, 82, 83, 5, 0]]
    assert laid(x, torch.tensor([5]), torch.tensor([2]), 1)[..., 0].tolist() == [[6]]
