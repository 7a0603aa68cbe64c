"""The Triton kernels of a memory with an omega window: its tokens are laid out in slots (``slots.py``), and the memory
of the slots, which has none, runs.
"""

from collections.abc import Sequence

from torch import Tensor

from .backward import run_backward
from .forward import run_forward
from .slots import Band, Layout, inner_of
from .spec import MemorySpec
from .state import matrix_names


class _Call:
    """A call in slots: its layout, its tokens and gates [1, T′, ...], what the kernels' launch code needs of the
    window, and the halos after the call."""

    def __init__(
        self,
        tokens: Sequence[Tensor | None],
        state: Sequence[Tensor],
        position: Tensor | None,
        cu_seqlens: Tensor | None,
        spec: MemorySpec,
    ) -> None:
        q, k, v, step, log_retain, log_momentum, gamma, delta = tokens
        assert k is not None and v is not None and gamma is not None
        layout = Layout(k, spec, position, cu_seqlens)
        matrices = len(matrix_names(spec))
        keys = k, v, gamma, *([] if delta is None else [delta])
        held: Sequence[Tensor | None] = state[matrices:] or [None] * len(keys)
        laid, self.after = zip(*map(layout.as_keys, keys, held), strict=True)
        own = [layout.as_own(x) for x in (q, step, log_retain, log_momentum)]
        self.layout, self.spec, self.matrices = layout, inner_of(spec, k.shape[-1]), matrices
        self.tokens = own[0], *laid[:2], *own[1:], None if delta is None else laid[3]
        self.state = state[:matrices]
        self.where = layout.position, layout.cu_seqlens
        least = layout.tokens + layout.before * -(-layout.tokens // layout.new)
        self.band = Band(laid[2], spec.window, layout.before, k.shape[1], spec.chunk_size, least)


def run_forward_window(
    tokens: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: MemorySpec,
    keep: bool,
) -> list[Tensor]:
    """As ``run_forward``, of q, k, v, step, log_retain, log_momentum, γ and δ; a state ends in its halo."""
    call = _Call(tokens, state, position, cu_seqlens, spec)
    o, *found = run_forward(call.tokens, weights, norm, call.state, *call.where, call.spec, keep, call.band)
    matrices, kept = found[: call.matrices], found[call.matrices + 1 :]
    return [call.layout.from_own(o), *matrices, *call.after, call.layout.after, *kept]


def run_backward_window(
    grad_o: Tensor,
    grad_state: Sequence[Tensor],
    tokens: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    norm: Tensor | None,
    state: Sequence[Tensor],
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Sequence[Tensor],
    spec: MemorySpec,
) -> list[Tensor | None]:
    """As ``run_backward``, of the tokens that :func:`run_forward_window` takes."""
    call = _Call(tokens, state, position, cu_seqlens, spec)
    d_o = call.layout.as_own(grad_o)
    assert d_o is not None
    found = run_backward(
        d_o, grad_state[: call.matrices], call.tokens, weights, norm, call.state, *call.where, kept, call.spec,
        call.band,
    )  # fmt: skip
    names = [1, 2, 6, 7]  # k, v, γ and δ
    d_held: list[Tensor | None] = []
    out: list[Tensor | None] = []
    d_after = iter(grad_state[call.matrices :])
    for place, x in enumerate(found[: len(tokens)]):
        if x is not None and place in names:
            x, held = call.layout.from_keys(x, next(d_after))
            d_held.append(held)
        elif x is not None:
            x = call.layout.from_own(x)
        out.append(x)
    return [*out, *found[len(tokens) :], *(d_held if state else [])]
