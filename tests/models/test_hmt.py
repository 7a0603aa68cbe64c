"""HMT: memory over segments. What it computes against its equations, who sees whom, and how far gradients go.

float64 throughout; the bound on differences is that of the conformance suite.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palimpsest.models import ConfigError, MemoryLM, State, build, load, load_state, stream
from palimpsest.models.lm import IGNORE

from .mixers import REGISTRY, small_model

BOUND = 1e-10
LENGTH = 31
HMT = {"segment": 6, "sensory": 2, "memories": 3, "bptt": 2, "summary": 4}
MODES = ("previous", "half", "none")
every_mode = pytest.mark.parametrize("mode", MODES)
#: Every kind of backbone by the default query, and some by the others.
pairs = [("previous", name) for name in ("attention, grouped", "window", "lmm", "mac", "mixture")]
every_pair = pytest.mark.parametrize(("mode", "backbone"), [*pairs, ("half", "mac"), ("none", "attention")])


def model_of(mode: str = "previous", backbone: str = "attention", **hmt: Any) -> MemoryLM:
    """An HMT of segments of 6 tokens over a registered mixer; its slots are as large as embeddings and more."""
    torch.manual_seed(0)
    model = build({"model": small_model(REGISTRY[backbone], hmt={**HMT, "recall": mode, **hmt})}).double()
    with torch.no_grad():
        model.hmt.gain.normal_()
    return model


def text(batch: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(seed))


def from_place(mode: str) -> int:
    """The first place of a segment whose prediction must be the same however the text is cut."""
    return HMT["summary"] - 1 if mode == "half" else 0


def sound(mode: str, length: int = LENGTH) -> Tensor:
    """Which tokens are said without having seen ahead."""
    return torch.arange(length) % HMT["segment"] >= from_place(mode)


def by_hand(model: MemoryLM, t: Tensor, mode: str) -> Tensor:
    """Logits of one row t [1, T] by the equations, one segment after the other, with nothing shared or kept."""
    hmt, long, memory = model.hmt, HMT["segment"], []

    def run(parts: list[Tensor]) -> Tensor:
        return model.through(torch.cat(parts)[None], None, None, False)[0][0]

    x, found = model.embed(t)[0], []
    for n, begin in enumerate(range(0, t.shape[1], long)):
        here = x[begin : begin + long]
        if not memory:
            p = hmt.empty
        elif mode == "none":
            p = memory[-1]
        else:
            first = begin if mode == "half" else begin - HMT["summary"]
            s = run([hmt.topic[None], x[first : first + HMT["summary"]], hmt.topic[None]])[-1]
            if mode == "half" and len(here) < HMT["summary"]:
                break  # not told yet
            m = torch.stack(memory[-HMT["memories"] :])
            scores = (hmt.recall.query.weight @ s) @ (m @ hmt.recall.key.weight.T).T / x.shape[1] ** 0.5
            p = scores.softmax(0) @ m
        slot = (p * hmt.gain)[None]
        before = x[max(0, begin - HMT["sensory"]) : begin]
        hidden = run([slot, before, here, slot])
        found.append(hidden[1 + len(before) : -1])
        memory.append(hidden[-1])
        assert len(memory) == n + 1
    return model._logits(torch.cat(found))


@every_mode
@pytest.mark.parametrize("backbone", ["attention", "mac"])
def test_it_is_what_the_equations_say(mode: str, backbone: str) -> None:
    model, t = model_of(mode, backbone), text(2)
    logits = model(t).logits
    for row in range(2):
        expected = by_hand(model, t[row : row + 1], mode)
        assert torch.allclose(logits[row, : len(expected)], expected, rtol=0, atol=BOUND)
    assert len(expected) == (30 if mode == "half" else LENGTH)


@every_pair
def test_split_anywhere_is_whole(mode: str, backbone: str) -> None:
    model, t = model_of(mode, backbone), text(2)
    whole, valid = model(t), sound(mode)
    for cut in (1, 4, 6, 9, 12, 16, 23):
        first = model(t[:, :cut])
        rest = model(t[:, cut:], first.state)
        logits = torch.cat([first.logits, rest.logits], 1)
        assert torch.allclose(logits[:, valid], whole.logits[:, valid], rtol=0, atol=BOUND), cut
        for (name, a), (_, b) in zip(rest.state.tensors(), whole.state.tensors(), strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=BOUND), (cut, name)


@pytest.mark.parametrize(("mode", "backbone"), [("previous", "mixture"), ("half", "attention"), ("none", "attention")])
def test_decoding_is_prefill(mode: str, backbone: str) -> None:
    """Token by token, with bounded work: no pass of the backbone is longer than a segment and what surrounds it."""
    model, t = model_of(mode, backbone), text(2)
    state, found, lengths = model.init_state(2), [], []
    model.blocks[0].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    for token in t.split(1, 1):
        before = len(lengths)
        out = model(token, state)
        state = out.state
        found.append(out.logits)
        assert len(lengths) - before <= 2 and sum(lengths[before:]) <= 6 + 2 + 2 + 4 + 2
    assert sum(lengths) / LENGTH < (4 if mode == "half" else 3)
    lengths.clear()
    whole = model(t).logits
    assert torch.allclose(torch.cat(found, 1)[:, sound(mode)], whole[:, sound(mode)], rtol=0, atol=BOUND)


@pytest.mark.parametrize(("mode", "backbone"), [*pairs, ("none", "attention")])
def test_the_future_changes_nothing(mode: str, backbone: str) -> None:
    model, t = model_of(mode, backbone), text(1)
    before = model(t).logits
    shifted = 1e-12 if backbone == "mixture" else 0.0  # rounding: its rows lie elsewhere inside a product
    for place in (1, 2, 5, 6, 7, 11, 12, 16, 30):
        moved = t.clone()
        moved[:, place] = (moved[:, place] + 1) % 11
        after = model(moved).logits
        assert torch.allclose(after[:, :place], before[:, :place], rtol=0, atol=shifted), place
        assert not torch.equal(after[:, place], before[:, place])


def test_the_published_query_sees_ahead_and_is_not_counted() -> None:
    """recall: half. Tokens move what is said before them, and only where the loss does not look."""
    model, t = model_of("half"), text(1)
    targets = t.roll(-1, 1)
    before, losses = model(t).logits, model.per_token_loss(t, targets)[0]
    leaks = []
    for place in range(1, LENGTH - 1):
        moved = t.clone()
        moved[:, place] = (moved[:, place] + 1) % 11
        after = (model(moved).logits - before).abs().amax(-1)[0, :place]
        leaks += after.nonzero().flatten().tolist()
        assert not after[sound("half")[:place]].any()
    assert {12, 13, 14} <= set(leaks) and {place % 6 for place in leaks} == {0, 1, 2}
    assert torch.equal(losses.isnan()[0], ~sound("half"))
    out = model(t, targets=targets)
    assert out.valid.item() == sound("half").sum().item() == 15
    assert torch.allclose(out.loss, losses.nanmean(), rtol=1e-6)
    assert torch.equal(model.counted(targets) == IGNORE, losses.isnan())
    cut = model(t[:, :8]).state  # two tokens into a segment
    assert torch.equal(model.per_token_loss(t[:, 8:], targets[:, 8:], cut)[0].isnan(), losses.isnan()[:, 8:])


@every_mode
def test_gradients_end_at_the_window(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bptt = 2: the loss of segment n reaches the tokens of its block {0, 1}, {2, 3}, … and those that the block's
    first segment reads directly, and exactly none before."""
    model, t = model_of(mode), text(1, 36)
    x = model.embed.weight.detach()[t[0]].requires_grad_()

    class Places(torch.nn.Module):
        weight = model.embed.weight

        def forward(self, places: Tensor) -> Tensor:
            return x[places]

    direct = {"previous": 4, "half": 2, "none": 2}[mode]  # tokens of the summary, or the sensory ones
    places = torch.arange(36)[None]
    del model._modules["embed"]
    model.embed = Places()
    hidden, _ = model.hmt(model, places, None, None, None, False)
    for segment in range(6):
        (grad,) = torch.autograd.grad(hidden[:, 6 * segment + 5].sum(), x, retain_graph=True)
        reached = grad.abs().amax(-1) > 0
        block = segment - segment % 2
        first = max(0, 6 * block - direct)
        assert not reached[:first].any() and reached[first : 6 * segment + 6].all(), segment


@pytest.mark.parametrize("bptt", [1, 2, 5])
def test_how_far_the_memory_vectors_reach(bptt: int) -> None:
    """The gradient of each segment with respect to the state that a call starts from: there up to the window's end."""
    model, t = model_of(bptt=bptt), text(1, 36)
    state = model(t[:, :12]).state.detach()
    state.layers[-1]["memory"].requires_grad_()
    hidden = model(t[:, 12:], state).logits
    for segment in range(2, 6):
        value = hidden[:, 6 * (segment - 2) + 5].sum()
        (grad,) = torch.autograd.grad(value, state.layers[-1]["memory"], retain_graph=True, allow_unused=True)
        reached = grad is not None and bool(grad.abs().max() > 0)
        assert reached == (segment // bptt == 1 // bptt and segment % bptt != 0)


@every_mode
def test_gradients_go_through_the_state(mode: str) -> None:
    """Those of two calls are those of one, wherever the cut."""
    model, t = model_of(mode), text(2)
    valid, grads = sound(mode), []
    for cut in (0, 5, 6, 9, 22):
        model.zero_grad()
        if cut:
            first = model(t[:, :cut])
            logits = torch.cat([first.logits, model(t[:, cut:], first.state).logits], 1)
        else:
            logits = model(t).logits
        logits[:, valid].sin().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]:
        for a, b in zip(other, grads[0], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=BOUND)


@every_mode
def test_every_parameter_is_reached(mode: str) -> None:
    model, t = model_of(mode), text(2)
    model(t, targets=t).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    asks = {"hmt.topic", "hmt.recall.query.weight", "hmt.recall.key.weight"}
    assert asks <= {name for name, _ in model.named_parameters()} or mode == "none"


def test_it_keeps_so_many_memory_vectors() -> None:
    """Of a long text the last N; and with room for all, a different answer."""
    model, t = model_of(), text(2, 60)
    state = model(t).state
    assert state.layers[-1]["memory"].shape == (2, 3, 8)
    wide = model_of(memories=10)
    wide.load_state_dict(model.state_dict())
    kept = wide(t).state.layers[-1]["memory"]
    assert torch.allclose(model(t[:, :24]).logits, wide(t[:, :24]).logits, rtol=0, atol=BOUND)  # three are enough
    assert not torch.allclose(model(t).logits[:, 24:], wide(t).logits[:, 24:], rtol=0, atol=1e-4)
    assert kept.shape == (2, 10, 8) and kept.abs().amin((0, 2)).min() > 0
    short = model(t[:, :13]).state.layers[-1]["memory"]
    assert not short[:, 0].any() and short[:, 1:].abs().amin(-1).min() > 0  # the newest last
    sizes = {state.bytes for _, state in stream(model, t, 6)}
    assert len({model(t[:, :n]).state.bytes for n in (6, 12, 30, 60)}) == 1 and len(sizes) == 2


@every_mode
@pytest.mark.parametrize("backbone", ["attention", "mac"])
def test_packed_documents_are_separate(mode: str, backbone: str) -> None:
    model, t, again = model_of(mode, backbone), text(1), text(1, seed=1)
    borders = [0, 4, 4, 11, 12, 25, LENGTH]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    packed = model(t, cu_seqlens=cu_seqlens)
    more = model(again, packed.state, cu_seqlens)
    assert packed.state.position.tolist() == [4, 0, 7, 1, 13, 6]
    for row, (a, b) in enumerate(pairwise(borders)):
        if a == b:
            assert packed.state.position[row] == 0
            continue
        alone = model(t[:, a:b])
        assert torch.allclose(packed.logits[:, a:b], alone.logits, rtol=0, atol=BOUND)
        longer = model(again[:, a:b], alone.state)
        assert torch.allclose(more.logits[:, a:b], longer.logits, rtol=0, atol=BOUND)
        for name in ("memory", "prompt", "tokens"):
            mine = more.state.layers[-1][name][row]
            assert torch.allclose(mine, longer.state.layers[-1][name][0], rtol=0, atol=BOUND)
    each, _ = model.per_token_loss(t, t, cu_seqlens=cu_seqlens)
    place = torch.cat([torch.arange(b - a) for a, b in pairwise(borders)])
    assert torch.equal(each.isnan()[0], place % 6 < from_place(mode))


@every_mode
def test_rows_at_different_places(mode: str) -> None:
    model, t = model_of(mode), text(3)
    state = model(t[:, :10]).state.reset([1], model.init_state(1))
    assert state.position.tolist() == [10, 0, 10]
    mixed, valid = model(t[:, 10:], state), sound(mode)
    assert torch.allclose(mixed.logits[[0, 2]][:, valid[10:]], model(t).logits[[0, 2], 10:][:, valid[10:]])
    assert torch.allclose(mixed.logits[1], model(t[1:2, 10:]).logits[0], rtol=0, atol=BOUND)
    picked = model(t[[2, 0], 10:], state.select([2, 0])).logits
    assert torch.allclose(picked, mixed.logits[[2, 0]], rtol=0, atol=BOUND)


def test_rows_are_independent() -> None:
    model, t = model_of(), text(3)
    moved = t.clone()
    moved[1] = (moved[1] + 1) % 11
    before, after = model(t).logits, model(moved).logits
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])


@every_mode
def test_state_goes_through_a_file(mode: str, tmp_path: Path) -> None:
    model, t = model_of(mode, "mac"), text(2)
    state = model(t[:, :15]).state
    state.save(tmp_path / "state")
    again = load_state(tmp_path / "state")
    assert isinstance(again, State) and again.bytes == state.bytes
    kept = [x.clone() for _, x in state.tensors()]
    assert torch.equal(model(t[:, 15:], again).logits, model(t[:, 15:], state).logits)
    assert all(torch.equal(a, b) for a, (_, b) in zip(kept, state.tensors(), strict=True))
    with pytest.raises(ValueError, match="state was made by a model of configuration"):
        model_of(mode, "mac", memories=4)(t, state)
    model_of(mode, "mac", bptt=7)(t, state)  # which changes no value


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, t = model_of("half").float(), text(2)
    model.save(tmp_path)
    again = load(tmp_path)
    assert again.config == model.config and torch.equal(again(t).logits, model(t).logits)


@every_mode
def test_training_lowers_the_loss(mode: str) -> None:
    torch.manual_seed(0)
    model = build({"model": small_model(REGISTRY["attention"], dim=16, init_std=0.1, hmt=HMT | {"recall": mode})})
    optimizer, t = torch.optim.AdamW(model.parameters(), lr=1e-2), text(4, 25)
    losses = []
    for _ in range(20):
        loss = model(t[:, :-1], targets=t[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_checkpointed_and_compiled_blocks_give_the_same() -> None:
    """What the training command does to ``blocks``; captured by the compiler, run by it without code generation."""
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    t, grads = text(2), []
    for way in ("plain", "checkpointed", "compiled"):
        model = model_of(backbone="window")
        for block in model.blocks:
            if way == "checkpointed":
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            elif way == "compiled":
                block.compile(backend="eager", fullgraph=True)
        model(t, targets=t).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for other in grads[1:]:
        assert all(torch.allclose(a, b, rtol=0, atol=BOUND) for a, b in zip(other, grads[0], strict=True))


def test_under_autocast() -> None:
    model, t = model_of(backbone="mac").float(), text(2)
    exact = model(t, targets=t).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(t, targets=t).loss
        state = model(t[:, :9]).state.reset([1], model.init_state(1))
        model(t[:, 9:], state)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2**-5)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_losses_of_the_layers_do_not_grow_with_the_segments() -> None:
    model = model_of(backbone="mixture").float()
    one, five = (sum(model(text(2, n), targets=text(2, n)).aux.values()).item() for n in (6, 30))
    assert 0.5 < five / one < 2 and five > 0


def test_work_per_token_does_not_grow() -> None:
    model = model_of()
    assert model.flops_per_token(120) == pytest.approx(model.flops_per_token(60), rel=0.1)
    plain = build({"model": small_model(REGISTRY["attention"])})
    assert model.flops_per_token(60) > plain.flops_per_token(6)


@every_mode
def test_what_is_seen_of_it(mode: str) -> None:
    model, t = model_of(mode, "mac"), text(2)
    seen = model.observe(t)
    assert {value.shape for value in seen.values()} == {(2, LENGTH)}
    numbers = model.diagnostics(t)
    assert any(name.startswith("layer.1/") for name in numbers) and ("hmt/age" in numbers) == (mode != "none")
    if mode != "none":
        age, count = seen["hmt/age"], seen["hmt/recalled"]
        assert age[:, :6].isnan().all() and torch.equal(age[:, 6:12], torch.ones(2, 6, dtype=torch.float64))
        assert (age[:, 18:30] > 1).all() and (age[:, 18:30] < 3).all() and (count[:, 18:30] <= 3).all()


def test_made_on_meta_then_drawn() -> None:
    with torch.device("meta"):
        model = build({"model": small_model(REGISTRY["attention"], hmt=HMT)})
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    model.reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model.hmt.gain, torch.full((8,), 0.4)) and model.hmt.empty.std() > 0.4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sensory": 7}, "sensory was 7; it must be at most segment = 6"),
        ({"summary": 7}, "summary was 7; it must be at most 6 for recall previous"),
        ({"summary": 6, "recall": "half"}, "summary was 6; it must be at most 5 for recall half"),
        ({"segments": 6}, "model.hmt.segments: unknown key 'segments' in model.hmt; did you mean 'segment'"),
        ({"recall": "later"}, "model.hmt.recall was 'later'"),
    ],
)
def test_configurations_that_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build({"model": small_model(REGISTRY["attention"], hmt=HMT | changed)})


def test_a_model_without_it_is_written_as_before() -> None:
    assert "hmt" not in build({"model": small_model(REGISTRY["attention"])}).config.model_dump()
