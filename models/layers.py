"""The small parts every block is made of: linear maps, norms, the gated MLP, rotary embedding."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import rms_norm
from ..kernels.packing import document_of
from .meta_autocast import MetaAutocast, meta_autocast_dtype


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this device; None where it is off."""
    if device.type == "meta":
        return meta_autocast_dtype()
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast leaves products alone."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return MetaAutocast(None) if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Linear(nn.Linear):
    """x W without a bias, W ~ N(0, std)."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw W anew."""
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    """Rows of a table, W ~ N(0, std)."""

    def __init__(self, rows: int, width: int, std: float) -> None:
        self.std = std
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.weight, std=self.std)


class RMSNorm(nn.Module):
    """x / rms(x) · w over the last dimension; with ``gate``, times silu(gate)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """w = 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [..., width] → the same shape and dtype."""
        return rms_norm(x, self.weight, gate=gate, eps=self.eps)


class _GatedLinear(torch.autograd.Function):
    """silu(x W_gᵀ) ⊙ x W_uᵀ for W = [W_g ‖ W_u], two products: work on halves of rows is slower."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        gate, up = (torch.nn.functional.linear(x, w) for w in weight.chunk(2))
        opened = F.silu(gate)  # kept: making it again costs more than the memory it takes
        ctx.save_for_backward(x, weight, gate, up, opened)
        return opened * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, gate, up, opened = ctx.saved_tensors  # type: ignore[attr-defined]
        (w_gate, w_up), d_weight = weight.chunk(2), torch.empty_like(weight)
        d_up = (opened * grad).flatten(0, -2)
        d_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        d_gate, flat = d_gate.flatten(0, -2), x.flatten(0, -2)
        for d_half, d_out in zip(d_weight.chunk(2), (d_gate, d_up), strict=True):
            torch.mm(d_out.mT, flat, out=d_half)
        return torch.mm(d_gate, w_gate).addmm_(d_up, w_up).view_as(x), d_weight


class SwiGLU(nn.Module):
    """(silu(x W_g) ⊙ x W_u) W_d (Shazeer, 2020); W_g and W_u are one matrix."""

    def __init__(self, dim: int, hidden: int, std: float, out_std: float) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden, std)
        self.down = Linear(hidden, dim, out_std)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] → [..., dim]."""
        if torch.compiler.is_compiling() or x.device.type != "cpu":  # a compiler fuses this; a GPU likes one product
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        kind = autocast_dtype(x.device) or x.dtype
        with full_precision(x.device):
            hidden = _GatedLinear.apply(x.to(kind), self.gate_up.weight.to(kind))
        return self.down(hidden)


class PersistentTokens(nn.Module):
    """Learnt tokens P [N_p, dim] that a layer sees besides its input (Titans, eq. 19), P ~ N(0, 1) as its input is
    RMS-normalised."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw P anew."""
        nn.init.normal_(self.tokens)

    def forward(self) -> Tensor:
        """P [N_p, dim]."""
        return self.tokens


def token_positions(length: int, start: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Place of each token in its own sequence, int64: [1, T], or [B, T] with ``start`` [B].

    With ``cu_seqlens`` [N + 1] the count begins again at every document's border; ``start`` is then [N].
    """
    place = torch.arange(length, device=device)
    if cu_seqlens is None:
        return place[None] if start is None else place + start[:, None].to(place.dtype)
    document = document_of(cu_seqlens, length)
    place = place - cu_seqlens[document]
    return (place if start is None else place + start[document])[None]


def rotary_angles(position: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−2i/width) for i < width/2, each [..., 1, width/2], for heads in between.

    The angle is formed in float64: at position 10⁶ a float32 angle would be wrong by 0.06.
    """
    rate = base ** (torch.arange(0, width, 2, device=position.device, dtype=torch.float64) / -width)
    angle = position[..., None, None] * rate
    return angle.cos().to(dtype), angle.sin().to(dtype)


@lru_cache(maxsize=16)
def _table(length: int, width: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a table first made for inference must serve training too
        return rotary_angles(torch.arange(length, device=device)[None], width, base, dtype)


def rotary_table(
    x: Tensor, base: float, start: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`rotary_angles` for x [B, T, H, D] whose rows begin at ``start``, as in :func:`token_positions`.

    In float32 (float64 for float64 x).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if start is None and cu_seqlens is None and not torch.compiler.is_compiling():
        return _table(x.shape[1], x.shape[3], base, dtype, x.device)
    return rotary_angles(token_positions(x.shape[1], start, cu_seqlens, x.device), x.shape[3], base, dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x_2i, x_2i+1) turned by their angles: one complex product, fewer passes than the real ones."""
    wide = x.to(cos.dtype)
    if torch.compiler.is_compiling():  # which fuses real products, and knows no complex ones
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
    if any(stride % 2 for stride in wide.stride()[:-1]) or wide.stride(-1) != 1 or wide.storage_offset() % 2:
        wide = wide.contiguous()  # complex numbers lie at even places
    return torch.view_as_real(_complex(wide) * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def _complex(x: Tensor) -> Tensor:
    """x [..., D] as pairs [..., D/2], sharing memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class _Rotate(torch.autograd.Function):
    """Rotation of pairs; its adjoint is the rotation back."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return _Rotate.apply(grad, cos, -sin), None, None


def rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of x [B, T, H, D], D even, by cos and sin of :func:`rotary_table`.

    Pairs are (x_2i, x_2i+1), as in the paper. Computed in the table's dtype, returned in x's.
    """
    return _Rotate.apply(x, *table)


@lru_cache(maxsize=16)
def _turns(
    length: int, heads: int, width: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """e^{i angle} [1, T, heads, D/2] of rows that begin at 0, and its conjugate; repeated for every head, because a
    product whose inner loop is one head wide is slower."""
    with torch.inference_mode(False):
        turn = torch.complex(*_table(length, width, base, dtype, device)).expand(1, length, heads, width // 2)
        return turn.contiguous(), turn.conj().resolve_conj().contiguous()


class _SplitRotate(torch.autograd.Function):
    """q and k rotated and v as it is, of [q ‖ k ‖ v]; the three gradients meet in one tensor, with no copy between."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, qkv: Tensor, heads: int, kv_heads: int, turn: Tensor, back: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.heads, ctx.kv_heads, ctx.back = heads, kv_heads, back  # type: ignore[attr-defined]
        both = heads + kv_heads
        turned = torch.view_as_real(_complex(qkv[:, :, :both]) * turn).flatten(-2)
        return turned[:, :, :heads], turned[:, :, heads:], qkv[:, :, both:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, d_q: Tensor, d_k: Tensor, d_v: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        heads, kv_heads, back = ctx.heads, ctx.kv_heads, ctx.back  # type: ignore[attr-defined]
        both = heads + kv_heads
        out = d_q.new_empty(*d_q.shape[:2], both + kv_heads, d_q.shape[3])
        out[:, :, both:] = d_v
        for start, stop, grad in ((0, heads, d_q), (heads, both, d_k)):
            turned = _complex(out[:, :, start:stop])
            torch.mul(_complex(grad.contiguous()), back[:, :, : stop - start], out=turned)
        return out, None, None, None, None


def split_rotary(
    qkv: Tensor, heads: int, kv_heads: int, base: float, start: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, D], k and v [B, T, Hkv, D] of qkv [B, T, H + 2 Hkv, D], q and k rotated as by :func:`rotary` with
    :func:`rotary_table`."""
    plain = start is None and cu_seqlens is None and qkv.device.type == "cpu" and qkv.is_contiguous()
    if plain and qkv.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        turns = _turns(qkv.shape[1], heads + kv_heads, qkv.shape[3], base, qkv.dtype, qkv.device)
        return _SplitRotate.apply(qkv, heads, kv_heads, *turns)
    qk, v = qkv.split([heads + kv_heads, kv_heads], dim=2)
    q, k = rotary(qk, rotary_table(qk, base, start, cu_seqlens)).split([heads, kv_heads], dim=2)
    return q, k, v
