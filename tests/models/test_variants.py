"""LMM, MAC, MAG and MAL against their equations, token by token in plain loops that share no code with the layers.

Bound: 1e-10 on absolute differences of values of order 1, in float64.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from palimpsest.kernels import neural_memory
from palimpsest.kernels.neural_memory import MemorySpec
from palimpsest.models.mixer_config import MemoryConfig
from palimpsest.models.mixers import Mixer
from palimpsest.models.mixers.attention import AttentionCore
from palimpsest.models.mixers.gates import MemoryGates
from palimpsest.models.mixers.lact import LargeChunkMemory
from palimpsest.models.mixers.mac import MemoryAsContext
from palimpsest.models.mixers.mag import MemoryAsGate
from palimpsest.models.mixers.mal import MemoryAsLayer
from palimpsest.models.mixers.neural_memory import MemoryLayer
from palimpsest.models.mixers.tnt import ShardedMemory

from .mixers import DIM, REGISTRY, small_mixer, tokens


class PlainMemory:
    """One sequence's memory. ``write_and_read`` takes a token; ``read`` asks without writing."""

    def __init__(self, layer: MemoryLayer) -> None:
        self.layer, self.spec = layer, layer.spec
        self.weights = [list(w.detach()) for w in layer.weights]  # [matrix][head]
        self.momentum = [[torch.zeros_like(w) for w in ws] for ws in self.weights]
        self.anchor = [list(ws) for ws in self.weights]
        self.place = 0
        self.past_write: list[Tensor] = []
        self.past_query: list[Tensor] = []

    def network(self, x: Tensor, weights: list[Tensor], head: int) -> Tensor:
        z = x
        for i, w in enumerate(weights):
            z = (F.gelu(z, approximate="tanh") if i else z) @ w
        if self.spec.norm:
            z = (z - z.mean()) / (z.var(unbiased=False) + 1e-6).sqrt() * self.layer.norm[head]
        return x + z if self.spec.residual else z

    def project(self, x: Tensor, past: list[Tensor], names: str) -> dict[str, Tensor]:
        dim, offset = self.layer.dim, self.layer.gate_width
        z = F.linear(x, self.layer.proj.weight)
        parts = {"q": z[offset : offset + dim], "k": z[offset + dim : offset + 2 * dim], "v": z[offset + 2 * dim :]}
        joint = torch.cat([parts[name] for name in names])
        past.append(joint)
        if self.layer.conv is not None:
            kernel = self.layer.conv[: len(joint)]
            recent = past[-kernel.shape[1] :]
            joint = sum(kernel[:, -1 - back] * recent[-1 - back] for back in range(len(recent)))
        heads = F.silu(joint).view(len(names), self.layer.heads, -1)
        out = dict(zip(names, heads, strict=True))
        for name in set(names) & {"q", "k"}:
            if self.layer.features is not None:
                out[name] = self.layer.features(out[name])
            out[name] = out[name] / (out[name].square().sum(-1, keepdim=True) + 1e-6).sqrt()
        return out

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.layer.out_norm.weight
        o = o.flatten()
        if self.layer.gate_width:
            o = o * F.silu(F.linear(x, self.layer.proj.weight[: self.layer.gate_width]))
        return F.linear(o, self.layer.out.weight)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g, c = self.layer.gates, self.spec.chunk_size
        z = list(F.linear(x, g.proj.weight).split(self.layer.heads))
        step = z.pop(0) + g.step_bias
        retain = momentum = torch.zeros_like(step)
        retain = torch.exp(-F.softplus(z.pop(0) + g.retain_bias) * g.retain_log.exp()) if g.decays else retain + 1
        momentum = torch.sigmoid(z.pop(0) + g.momentum_bias) if g.moves else momentum
        return torch.sigmoid(step) * g.memory.step_max * (1 - momentum) / (c * self.spec.layers), retain, momentum

    def write_and_read(self, x: Tensor) -> Tensor:
        token = self.project(x, self.past_write, "qkv")
        step, retain, momentum = self.gates(x)
        outputs = []
        for h in range(self.layer.heads):
            before = [ws[h] for ws in self.weights]
            at = [ws[h].detach().requires_grad_() for ws in self.anchor]
            answer = self.network(token["k"][h], at, h)
            v = token["v"][h]
            loss = 0.5 * (answer - v).square().sum() if self.spec.bias == "l2" else -(answer @ v)
            for i, gradient in enumerate(torch.autograd.grad(loss, at)):
                self.momentum[i][h] = momentum[h] * self.momentum[i][h] - step[h] * gradient
                self.weights[i][h] = retain[h] * self.weights[i][h] + self.momentum[i][h]
            after = [ws[h] for ws in self.weights]
            outputs.append(self.network(token["q"][h], after if self.spec.read_after_write else before, h))
        self.place = (self.place + 1) % self.spec.chunk_size
        if self.place == 0:
            self.anchor = [list(ws) for ws in self.weights]
        return self.finish(torch.stack(outputs), x)

    def read(self, x: Tensor, weights: list[list[Tensor]]) -> Tensor:
        q = self.project(x, self.past_query, "q")["q"]
        heads = range(self.layer.heads)
        return self.finish(torch.stack([self.network(q[h], [ws[h] for ws in weights], h) for h in heads]), x)


def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * module.weight


def rotated(x: Tensor, position: int, core: AttentionCore) -> Tensor:
    """x [heads, D] as D/2 complex numbers, each turned by its own angle."""
    if not core.rope:
        return x
    half = x.shape[-1] // 2
    turn = [position * core.base ** (-i / half) for i in range(half)]
    spin = torch.tensor([complex(math.cos(a), math.sin(a)) for a in turn], dtype=torch.complex128)
    turned = torch.complex(x[:, 0::2], x[:, 1::2]) * spin
    return torch.view_as_real(turned).flatten(-2)


def attend(core: AttentionCore, x: Tensor, position: int, others: list[tuple[Tensor, int | None]]) -> Tensor:
    """Attention of token x over ``others``: tokens, each with its position (None: not rotated)."""
    heads, shared, width = core.heads, core.kv_heads, core.width

    def split(token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.linear(token, core.qkv.weight).view(-1, width).split([heads, shared, shared])

    q = rotated(split(x)[0], position, core)
    keys = [split(token)[1] if at is None else rotated(split(token)[1], at, core) for token, at in others]
    values = [split(token)[2] for token, _ in others]
    outputs = []
    for h in range(heads):
        own = h // (heads // shared)
        scores = torch.stack([q[h] @ key[own] / math.sqrt(width) for key in keys])
        outputs.append(scores.softmax(0) @ torch.stack([value[own] for value in values]))
    return torch.cat(outputs)


def lmm(mixer: MemoryLayer, x: Tensor) -> list[Tensor]:
    memory = PlainMemory(mixer)
    return [memory.write_and_read(token) for token in x]


def mag(mixer: MemoryAsGate, x: Tensor, squash: Callable[[Tensor], Tensor]) -> list[Tensor]:
    core, memory, outputs = mixer.attention, PlainMemory(mixer.memory), []
    fixed = [(token, None) for token in core.persistent.tokens]
    for t, token in enumerate(x):
        y = attend(core, token, t, fixed + [(x[j], j) for j in range(max(0, t - core.window + 1), t + 1)])
        gate = squash(norm(memory.write_and_read(token), mixer.gate.norm_memory))
        outputs.append(F.linear(norm(y, mixer.gate.norm_y) * gate, mixer.gate.out.weight))
    return outputs


def mal(mixer: MemoryAsLayer, x: Tensor) -> list[Tensor]:
    fixed = [] if mixer.persistent is None else list(mixer.persistent.tokens)
    core, memory = mixer.attention.core, PlainMemory(mixer.memory)
    y = [norm(memory.write_and_read(token), mixer.norm) for token in [*fixed, *x]]
    outputs = []
    for t in range(len(y)):
        o = attend(core, y[t], t, [(y[j], j) for j in range(max(0, t - core.window + 1), t + 1)])
        outputs.append(F.linear(o, mixer.attention.out.weight))
    return outputs[len(fixed) :]


def mac(mixer: MemoryAsContext, x: Tensor, squash: Callable[[Tensor], Tensor]) -> list[Tensor]:
    core, memory, outputs = mixer.attention, PlainMemory(mixer.memory), []
    fixed = [] if core.persistent is None else [(token, None) for token in core.persistent.tokens]
    for t, token in enumerate(x):
        place = t % mixer.segment
        if place == 0:
            context, segment = [], []
            before = [list(ws) for ws in memory.weights]
        context.append((norm(memory.read(token, before), mixer.norm_read), place))
        segment.append((token, mixer.segment + place))
        y = norm(attend(core, token, mixer.segment + place, fixed + context + segment), mixer.gate.norm_y)
        gate = squash(norm(memory.write_and_read(y), mixer.gate.norm_memory))
        outputs.append(F.linear(y * gate, mixer.gate.out.weight))
    return outputs


def gates_of(g: MemoryGates, spec: MemorySpec, x: Tensor) -> dict[str, Tensor]:
    """What gates say of tokens x [T, dim], each [1, T, H]; of channels [1, T, H, D], their rows in the heads' order."""
    rows = g.width if spec.gates == "channel" else 1
    moves, keeps = spec.rule in ("momentum", "muon"), spec.retention in ("l2", "lq", "kl")
    z, weight = [], g.proj.weight
    for own in [rows] * (1 + keeps + moves) + [1] * ((spec.window > 1) + (spec.bias == "huber")):
        of_heads, weight = weight[: g.heads * own].view(g.heads, own, -1), weight[g.heads * own :]
        z.append(torch.stack([x @ head.T for head in of_heads], 1))
    z = [part if part.shape[-1] > 1 else part[..., 0] for part in z]
    assert not len(weight)
    step = torch.sigmoid(z.pop(0) + g.step_bias) * g.memory.step_max / (spec.chunk_size * spec.layers * spec.window)
    gates = {}
    if keeps:
        gates["log_retain"] = -F.softplus(z.pop(0) + g.retain_bias) * g.retain_log.exp()
    if moves:
        momentum = torch.sigmoid(z.pop(0) + g.momentum_bias)
        gates["log_momentum"], step = momentum.log(), step * (1 - momentum)
    if spec.window > 1:
        gates["gamma"] = torch.sigmoid(z.pop(0) + g.gamma_bias)
    if spec.bias == "huber":
        gates["delta"] = (1 + (z.pop(0) + g.delta_bias).exp()).log()
    assert not z
    return {name: gate[None] for name, gate in (gates | {"step": step}).items()}


def through(tokens: dict[str, Tensor], weights: list[Tensor], spec: MemorySpec, norm: Tensor | None) -> Tensor:
    """The operation's reference on [1, T, H, D] → [T, H, D]."""
    return neural_memory(**tokens, weights=list(weights), spec=spec, norm=norm, backend="reference")[0][0]


def projected(layer: MemoryLayer, x: Tensor) -> dict[str, Tensor]:
    """q, k, v [1, T, H, D]."""
    plain, past = PlainMemory(layer), []
    tokens = [plain.project(token, past, "qkv") for token in x]
    return {name: torch.stack([each[name] for each in tokens])[None] for name in "qkv"}


def of_the_space(layer: MemoryLayer, x: Tensor) -> Tensor:
    """A memory that :class:`PlainMemory` does not have, by the operation's reference; what is around it in loops."""
    tokens = projected(layer, x) | gates_of(layer.gates, layer.spec, x)
    o = through(tokens, layer.weights, layer.spec, layer.norm)
    return torch.stack([PlainMemory(layer).finish(o[t], token) for t, token in enumerate(x)])


def tnt(layer: ShardedMemory, x: Tensor) -> Tensor:
    given = projected(layer, x)
    o = through(given | gates_of(layer.gates, layer.spec, x), layer.weights, layer.spec, layer.norm)
    for begin in range(0, len(x), layer.shard):
        shard = slice(begin, begin + layer.shard)
        q, k, v = (given[name][:, shard] for name in "qkv")
        asked = torch.zeros_like(q)
        for t in range(q.shape[1]):
            for h in range(layer.heads):
                asked[0, t, h] = sum(key * (key @ q[0, t, h]) for key in k[0, : t + 1, h])
        asked = asked / layer.width**0.5
        asked = asked / (asked.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        tokens = {"q": asked, "k": k, "v": v} | gates_of(layer.local_gates, layer.local, x[shard])
        o[shard] += through(tokens, layer.local_weights, layer.local, layer.local_norm)
    return torch.stack([PlainMemory(layer).finish(o[t], token) for t, token in enumerate(x)])


def lact(layer: LargeChunkMemory, x: Tensor) -> Tensor:
    core, plain = layer.attention, PlainMemory(layer)
    gate, qkv = F.linear(x, layer.proj.weight).split([layer.gate_width, 3 * layer.dim], -1)
    q, k, v = qkv.split(layer.dim, -1)
    s, b = layer.stretch.split(layer.dim), layer.shift.split(layer.dim)
    memory = {"q": F.silu(q * s[0] + b[0]), "k": F.silu(k * s[1] + b[1]), "v": F.silu(v)}
    memory = {name: y.view(1, len(x), layer.heads, -1) for name, y in memory.items()}
    for name in "qk":
        memory[name] = memory[name] / (memory[name].square().sum(-1, keepdim=True) + 1e-6).sqrt()
    o = through(memory | gates_of(layer.gates, layer.spec, x), layer.weights, layer.spec, layer.norm)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * plain.layer.out_norm.weight
    outputs = []
    for t in range(len(x)):
        near = range(max(0, t - core.window + 1), t + 1)
        turned = rotated(q[t].view(core.heads, -1), t, core)
        keys = [rotated(k[j].view(core.heads, -1), j, core) for j in near]
        seen = []
        for h in range(core.heads):
            scores = torch.stack([turned[h] @ key[h] / math.sqrt(core.width) for key in keys])
            seen.append(scores.softmax(0) @ torch.stack([v[j].view(core.heads, -1)[h] for j in near]))
        outputs.append(F.linear(torch.cat(seen) + o[t].flatten() * F.silu(gate[t]), layer.out.weight))
    return torch.stack(outputs)


GATES = {"sigmoid": lambda z: 1 / (1 + (-z).exp()), "silu": lambda z: z / (1 + (-z).exp())}
PLAIN = {"neural_memory": lmm, "titans_mag": mag, "titans_mal": mal, "titans_mac": mac}


def plain(mixer: dict) -> bool:
    """Whether :class:`PlainMemory` has its memory."""
    return mixer["kind"] in PLAIN and MemoryConfig(**mixer["memory"]).spec.derived_by_hand


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("lmm, omega", of_the_space),
        ("lmm, gated", of_the_space),
        ("tnt", tnt),
        ("tnt, channels", tnt),
        ("lact", lact),
    ],
)
def test_the_layer_around_any_memory(name: str, wanted: Callable[..., Tensor]) -> None:
    keys = {}
    if name == "tnt, channels":
        name = "tnt"
        keys = {part: {**REGISTRY[name][part], "gates": "channel"} for part in ("memory", "local")}
    mixer: MemoryLayer = small_mixer(name, **keys).requires_grad_(False)
    for parameter in mixer.parameters():
        if parameter.dim() == 1 or parameter.shape == (mixer.heads, mixer.width):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    x = tokens(1, 17)
    assert (mixer(x)[0][0] - wanted(mixer, x[0])).abs().max() <= 1e-10


@pytest.mark.parametrize("name", [name for name, mixer in REGISTRY.items() if plain(mixer)])
def test_the_layer_is_its_equations(name: str) -> None:
    mixer: Mixer = small_mixer(name).requires_grad_(False)
    for parameter in mixer.parameters():  # scales that start at 1 or 0 would hide a missing factor
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    x = tokens(1, 17)
    kind = REGISTRY[name]["kind"]
    squash = [GATES[REGISTRY[name].get("gate", "sigmoid")]] if kind in ("titans_mac", "titans_mag") else []
    expected = torch.stack(PLAIN[kind](mixer, x[0], *squash))
    assert expected.shape == (17, DIM)
    assert (mixer(x)[0][0] - expected).abs().max() <= 1e-10
