"""What a neural memory is told of every token: how much to write, to keep, and to go on moving."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.neural_memory.spec import MemorySpec
from ..config import ModelConfig
from ..layers import Linear, full_precision
from ..mixer_config import MemoryRule


class MemoryGates(nn.Module):
    """Step θ, retention a and momentum η of every token and head, or with ``gates: channel`` of each of its channels,
    from one projection z = x W + b, in float32.

        log a = −softplus(z_a) · r,  r learnt, like b      the form of Mamba-2 and Gated DeltaNet
        log η = logsigmoid(z_η)
        θ     = step_max · sigmoid(z_θ) · (1 − η) / (C n c κ)   C the chunk's length, n the number of matrices
        γ     = sigmoid(z_γ)                                with a window of c tokens
        δ     = softplus(z_δ)                               with the bias huber

    All gradients of a chunk are taken at the weights it began with, so what one chunk may move the memory is
    Σ θ / (1 − η) over its C tokens, each written c times with a window; written as above, n of these are at most
    ``step_max`` / κ at every C, c and η, and about 1 / κ at the start. With W_0 drawn as in :func:`draw_start` the
    inner loss has a curvature of order κ for each of the n matrices, 1 for l2 (:func:`curvature`); gradient descent is
    stable up to 2 over the curvature, hence the default ``step_max`` of 2. Muon gives every write the same size: θ
    weighs tokens against each other.

    η starts at 0.9, γ at 0.88, and δ at √D, about the size of the error of a memory that ends in a LayerNorm; r so that
    memories halve in ``half_life`` tokens. The decays that linear memories start with, up to 0.1, ruin a deep one.
    Without a LayerNorm its matrices all shrink together, and zero is a place that no gradient leads out of. With one,
    the output keeps its size while the weights shrink, and the gradient grows as their inverse, without bound along a
    sequence of many half-lives: what is trained on longer sequences than the shortest of them wants longer ones.
    Every channel starts as a head would.
    """

    def __init__(self, model: ModelConfig, memory: MemoryRule, heads: int, project: bool = True) -> None:
        super().__init__()
        self.memory, self.heads, self.width = memory, heads, model.dim // heads
        spec = memory.spec
        self.scale = memory.step_max / (spec.chunk_size * spec.layers * spec.window * curvature(spec, self.width))
        self.decays, self.moves = spec.retention_gate, spec.momentum_gate
        self.refits, self.tolerates = spec.window > 1, spec.bias == "huber"
        own: tuple[int, ...] = (heads, self.width) if spec.gates == "channel" else (heads,)
        self.own = own
        self.proj = Linear(model.dim, self.outputs, model.init_std) if project else None  # else somebody gives z
        self.step_bias = nn.Parameter(torch.empty(own))
        if self.decays:
            self.retain_bias = nn.Parameter(torch.empty(own))
            self.retain_log = nn.Parameter(torch.empty(own))
        if self.moves:
            self.momentum_bias = nn.Parameter(torch.empty(own))
        if self.refits:
            self.gamma_bias = nn.Parameter(torch.empty(heads))
        if self.tolerates:
            self.delta_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @property
    def outputs(self) -> int:
        """Channels of z."""
        return sum(math.prod(shape) for shape in self._shapes())

    def _shapes(self) -> list[tuple[int, ...]]:
        """What one token has of each gate, in the order of z."""
        return [self.own] * (1 + self.decays + self.moves) + [(self.heads,)] * (self.refits + self.tolerates)

    def reset_parameters(self) -> None:
        """n Σ θ / (1 − η) = min(1, step_max / 2) over a chunk; softplus(b_a) = 1; r log-uniform; η = 0.9; softplus(b_δ)
        = √D."""
        start = min(1 / self.memory.step_max, 0.5)
        nn.init.constant_(self.step_bias, math.log(start / (1 - start)))
        if self.decays:
            nn.init.constant_(self.retain_bias, math.log(math.e - 1))
            least, most = self.memory.start_half_life
            nn.init.uniform_(self.retain_log, math.log(math.log(2) / most), math.log(math.log(2) / least))
        if self.moves:
            nn.init.constant_(self.momentum_bias, math.log(9.0))
        if self.refits:
            nn.init.constant_(self.gamma_bias, 2.0)
        if self.tolerates:
            nn.init.constant_(self.delta_bias, math.log(math.expm1(self.width**0.5)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, T, dim] → ``step`` θ, ``log_retain``, ``log_momentum``, ``gamma`` and ``delta``, those that the memory
        takes, as the operation takes them, in float32 (float64 for float64 x)."""
        assert self.proj is not None
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        with full_precision(x.device):
            return self.activate(F.linear(x.to(kind), self.proj.weight.to(kind)))

    def activate(self, z: Tensor) -> dict[str, Tensor]:
        """The same from z [B, T, ``outputs``], b not yet added."""
        kind = torch.float64 if z.dtype == torch.float64 else torch.float32
        shapes = self._shapes()
        split = z.to(kind).split([math.prod(shape) for shape in shapes], dim=-1)
        parts = [part.unflatten(-1, shape) for part, shape in zip(split, shapes, strict=True)]
        gates = {"step": torch.sigmoid(parts.pop(0) + self.step_bias.to(kind)) * self.scale}
        if self.decays:
            rate = self.retain_log.to(kind).exp()
            gates["log_retain"] = F.softplus(parts.pop(0) + self.retain_bias.to(kind)) * -rate
        if self.moves:
            moved = parts.pop(0) + self.momentum_bias.to(kind)
            gates["log_momentum"] = F.logsigmoid(moved)
            gates["step"] = gates["step"] * torch.sigmoid(-moved)
        if self.refits:
            gates["gamma"] = torch.sigmoid(parts.pop(0) + self.gamma_bias.to(kind))
        if self.tolerates:
            gates["delta"] = F.softplus(parts.pop(0) + self.delta_bias.to(kind))
        return gates

    def named(self, z: Tensor) -> dict[str, Tensor]:
        """θ as ``step``, a as ``retention``, η as ``momentum``, γ as ``gamma``, δ as ``delta``, of z [..., outputs]:
        [..., H] each, where used; a mean over channels."""
        names = {"log_retain": "retention", "log_momentum": "momentum"}
        found = {names.get(name, name): y.exp() if name in names else y for name, y in self.activate(z).items()}
        return {name: y.mean(-1) if y.dim() > z.dim() else y for name, y in found.items()}


def curvature(spec: MemorySpec, width: int) -> float:
    """κ: how much steeper the inner loss of a memory of head width D bends at W_0 than l2 in the same network.

    ``lp``: |r|^(p − 2) (p − 1) at errors of 2, where those of a memory with a LayerNorm mostly lie; as l2 for p ≤ 2.
    ``lq`` under a LayerNorm: the output forgets the weights' size and bends as its inverse square, while lq makes them
    w instead of 1 (:func:`start_std`), with as much of D as of W.
    """
    bends = (spec.lp_power - 1) * 2 ** (spec.lp_power - 2) if spec.bias == "lp" and spec.lp_power > 2 else 1.0
    if spec.retention == "lq" and spec.norm:
        bends /= start_std(spec, width * spec.expansion * width) ** 2
    return bends


def start_std(spec: MemorySpec, entries: int) -> float:
    """(E|z|^q · entries)^(−1/q), z normal: the standard deviation at which a matrix has ‖D‖_q = 1, where W = D."""
    q = spec.lq_power
    moment = 2 ** (q / 2) * math.gamma((q + 1) / 2) / math.pi**0.5
    return (moment * entries) ** (-1 / q)
