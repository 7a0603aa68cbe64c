"""Mixture of memories: against separate dense memories, what decoding touches, what it costs, what the router learns.

Bounds are on absolute differences of values of order 1 in float64: 1e-12, some hundred times the rounding of one sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from palimpsest.kernels import delta_rule, linear_attention, neural_memory
from palimpsest.models import build
from palimpsest.models.config import ConfigError, ModelConfig, validate
from palimpsest.models.losses import collected
from palimpsest.models.mixers import make_mixer
from palimpsest.models.mixers import mixture as mixture_module
from palimpsest.models.mixers.mixture import MixtureOfMemories

from .mixers import DIM, REGISTRY, small_mixer, small_model, tokens

MIXTURES = [name for name in REGISTRY if name.startswith("mixture")]
every_mixture = pytest.mark.parametrize("name", MIXTURES)


def mixture(**keys: Any) -> MixtureOfMemories:
    torch.manual_seed(0)
    config = validate(ModelConfig, small_model({**REGISTRY["mixture"], **keys}))
    made = make_mixer(config, config.mixer_of(0)).double()
    assert isinstance(made, MixtureOfMemories)
    return made


def choices(layer: MixtureOfMemories, x: Tensor) -> tuple[Tensor, Tensor]:
    """Memories [T, k] of one sequence's tokens, the likeliest first, and their weights."""
    p = F.linear(x, layer.router.weight).softmax(-1)
    kept, chosen = p.topk(layer.mixer.top_k)
    return chosen, kept / kept.sum(-1, keepdim=True) if layer.mixer.top_k > 1 else kept


def one_memory(layer: MixtureOfMemories, m: int, x: Tensor) -> Tensor:
    """What memory m alone reads [n, H, D] on tokens x [n, dim], all its own: a dense layer in plain torch."""
    dim, start = layer.dim, layer.gate_width
    z = F.linear(x, layer.proj.weight)[:, start:]
    q, written = z[:, :dim], z[:, dim:]
    if layer.write is not None:
        written = x @ layer.write[m]
    joint = torch.cat([q, written[:, : 2 * dim]], -1)
    if layer.conv is not None:
        size = layer.conv.shape[1]
        padded = F.pad(joint, (0, 0, size - 1, 0))
        joint = sum(padded[j : j + len(x)] * layer.conv[:, j] for j in range(size))
    q, k, v = (y.unflatten(-1, (layer.heads, -1)) for y in F.silu(joint).split(dim, -1))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    inputs = [y[None] for y in (q, k, v)]
    gates = layer.gates.activate(written[None, :, 2 * dim :])
    if layer.spec is not None:
        options = {"weights": [w[m] for w in layer.weights], "spec": layer.spec, "norm": layer.norm}
        return neural_memory(*inputs, **gates, **options, backend="reference")[0][0]
    if layer.mixer.rule == "linear_attention":
        return linear_attention(*inputs, **gates, backend="reference")[0][0]
    return delta_rule(*inputs, **gates, backend="reference")[0][0]


def one_by_one(layer: MixtureOfMemories, x: Tensor) -> Tensor:
    """The layer on one sequence x [T, dim]: M dense memories, each run on its own tokens."""
    chosen, weight = choices(layer, x)
    total = torch.zeros(len(x), layer.heads, layer.width, dtype=x.dtype)
    for m in range(layer.memories):
        shared = m == layer.mixer.memories
        mine = torch.arange(len(x)) if shared else (chosen == m).any(-1).nonzero()[:, 0]
        if len(mine):
            share = 1.0 if shared else (weight * (chosen == m)).sum(-1)[mine][:, None, None]
            total = total.index_add(0, mine, share * one_memory(layer, m, x[mine]))
    y = total / (total.square().mean(-1, keepdim=True) + layer.out_norm.eps).sqrt() * layer.out_norm.weight
    if layer.gate_width:
        y = y * F.silu(F.linear(x, layer.proj.weight[: layer.gate_width]).view_as(y))
    return F.linear(y.flatten(1), layer.out.weight)


@every_mixture
def test_equal_to_separate_memories(name: str) -> None:
    layer, x = small_mixer(name), tokens(2, 23).requires_grad_()
    with torch.no_grad():
        layer.out_norm.weight.normal_()  # a scale of 1 would hide a missing factor
    found, wanted = layer(x)[0], torch.stack([one_by_one(layer, row) for row in x])
    assert (found - wanted).abs().max() <= 1e-12
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(3))
    named = {"x": x, **dict(layer.named_parameters())}
    pairs = [torch.autograd.grad((y * weights).sum(), list(named.values())) for y in (found, wanted)]
    for key, a, b in zip(named, *pairs, strict=True):
        assert (a - b).abs().max() <= 1e-11 * max(1.0, b.abs().max().item()), key


def test_one_memory_is_a_plain_layer() -> None:
    """What mixtures are compared with: no router's weight, every token in the one memory."""
    layer, x = mixture(memories=1, top_k=1, shared=False, projections="shared"), tokens(2, 23)
    with torch.no_grad():
        layer.out_norm.weight.normal_()
    assert (layer(x)[0] - torch.stack([one_by_one(layer, row) for row in x])).abs().max() <= 1e-12
    assert layer.idle_parameters() == 0


@every_mixture
@pytest.mark.parametrize("training", [True, False])
def test_a_token_moves_nothing_before_it_and_nothing_in_other_rows(name: str, training: bool) -> None:
    """Rows of a product shift when a token changes its memory: to rounding there, exactly zero in the gradient."""
    layer, x = small_mixer(name).train(training), tokens(3, 19)
    before = layer(x)[0]
    for t in (0, 4, 11, 18):
        moved = x.clone()
        moved[1, t] = -moved[1, t]
        after = layer(moved)[0]
        assert (after[:, :t] - before[:, :t]).abs().max() <= 1e-12 if t else True
        assert (after[[0, 2]] - before[[0, 2]]).abs().max() <= 1e-12
        assert (after[1, t] - before[1, t]).abs().max() > 1e-6
        watched = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(watched)[0][1, : t + 1].square().sum(), watched)
        assert not grad[[0, 2]].any() and not grad[1, t + 1 :].any() and grad[1, t].any()


@every_mixture
def test_decoding_touches_the_chosen_memories_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = small_mixer(name), tokens(3, 9)
    seen = []

    def spy(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        seen.extend(len(tensor) for tensor in (options["state"] or {}).values())
        return run(*args, **options)

    for rule in ("delta_rule", "linear_attention", "neural_memory", "short_conv"):
        monkeypatch.setattr(mixture_module, rule, partial(spy, getattr(mixture_module, rule)))
    _, state = layer(x[:, :8])
    seen.clear()
    _, after = layer(x[:, 8:], state)
    assert set(seen) == {3 * (layer.mixer.top_k + layer.mixer.shared)}, (
        "states of other memories do not even come along"
    )
    for row in range(3):
        chosen = set(choices(layer, x[row, 8:])[0][0].tolist())
        chosen |= {layer.mixer.memories} if layer.mixer.shared else set()
        for part, tensors in after.items():
            for key, tensor in tensors.items():
                same = [torch.equal(tensor[row, m], state[part][key][row, m]) for m in range(layer.memories)]
                assert all(same[m] for m in range(layer.memories) if m not in chosen), (part, key)
        memory, old = after["memory"], state["memory"]
        key = "memory" if layer.spec is None else "weights.0"
        assert not any(torch.equal(memory[key][row, m], old[key][row, m]) for m in chosen)


def flops(layer: MixtureOfMemories, length: int) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(tokens(1, length), return_state=False)[0].sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("rule", ["gated_delta", "linear_attention"])
def test_routed_flops_are_a_share_of_dense_ones(rule: str) -> None:
    """top-k / M of what it costs to have all M memories take every token, and once for the shared memory.

    Within 5 %: chunks of a memory's own tokens are counted as if they were full.
    """
    dense, routed, shared = (
        flops(mixture(rule=rule, memories=8, top_k=k, shared=s), 64) for k, s in ((8, False), (2, False), (2, True))
    )
    # What every token costs whatever the router says: the dense projections.
    fixed = 3 * 2 * 64 * DIM * (8 + 2 * DIM + DIM)
    assert abs((routed - fixed) / ((dense - fixed) * 2 / 8) - 1) <= 0.05
    assert abs((shared - routed) / ((dense - fixed) / 8) - 1) <= 0.05


@every_mixture
def test_no_value_is_read_by_the_host(name: str) -> None:
    """Tensors on meta have no values: whoever asks for one fails."""
    with torch.device("meta"):
        config = validate(ModelConfig, small_model(REGISTRY[name]))
        layer = make_mixer(config, config.mixer_of(0))
        x = torch.empty(2, 16, DIM, requires_grad=True)
        y, state = layer(x)
        y.sum().backward()
        layer(torch.empty(2, 1, DIM), state)
        layer(x[:1], None, torch.empty(4, dtype=torch.int32))
    assert x.grad is not None and x.grad.shape == x.shape


@every_mixture
def test_compiled_is_eager(name: str) -> None:
    layer, x = small_mixer(name), tokens(2, 11)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = run(x, return_state=False)[0]
    assert (found - layer(x)[0]).abs().max() <= 1e-12


def test_losses_of_the_router() -> None:
    layer, x = mixture(router_z_weight=0.5, balance_weight=0.25), tokens(2, 12)
    with collected() as found:
        layer(x)
    logits = F.linear(x, layer.router.weight)
    p, chosen = logits.softmax(-1), logits.topk(2).indices
    share = torch.stack([(chosen == m).double().mean() * 1 for m in range(3)])
    wanted = 3 * (share * p.mean((0, 1))).sum()
    assert torch.allclose(found["balance"][0], 0.25 * wanted, rtol=1e-12)
    assert torch.allclose(found["router_z"][0], 0.5 * logits.logsumexp(-1).square().mean(), rtol=1e-12)
    with collected() as found:
        layer.eval()(x)
    assert not found


def test_a_model_reports_the_sum_over_its_layers() -> None:
    torch.manual_seed(0)
    model = build({"model": small_model(REGISTRY["mixture"], ffn_hidden=0)})
    t = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    out = model(t, targets=t)
    assert set(out.aux) == {"balance"} and out.aux["balance"].requires_grad
    assert 0.01 * 2 * 0.5 < out.aux["balance"].item() < 0.01 * 2 * 3
    assert model.eval()(t, targets=t).aux == {} and model(t).aux == {}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"top_k": 4}, "top_k was 4; it must be at most memories = 3"),
        ({"rule": "neural"}, "memory was null; it must be given for the rule neural"),
        ({"memory": {}}, "memory was a section; it must be null for the rule gated_delta"),
        ({"memories": 65}, "mixer.memories was 65"),
        ({"rule": "gated_dleta"}, "mixer.rule was 'gated_dleta'"),
        ({"heads": 3}, "heads of mixer mixture was 3; it must divide dim = 8"),
    ],
)
def test_configurations_that_cannot_be(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(ModelConfig, small_model({**REGISTRY["mixture"], **keys}))


def test_what_the_router_did() -> None:
    layer, x = mixture(), tokens(2, 30)
    numbers = layer.diagnose(x)
    chosen = torch.cat([choices(layer, row)[0] for row in x])
    for m in range(3):
        assert torch.allclose(numbers[f"load.{m}"].double(), (chosen == m).double().mean(), atol=1e-6)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1:].fill_(0)
    even = layer.diagnose(x)
    assert abs(even["entropy"].item() - torch.tensor(3.0).log().item()) < 1e-6
    assert even["dead"].item() == 1 and even["load.2"].item() == 0  # ties go to the lower memories
