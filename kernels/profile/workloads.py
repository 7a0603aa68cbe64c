"""What is reported and timed: each operation at the shapes it is documented with, and at small ones for a CPU.

A workload draws its arguments, calls the operation's public function with a backend, and knows the cost of forward and
backward. Sizes are named by letters: B rows, T tokens, H heads, D width of a head, G heads of keys and values, C
channels, K width of a convolution, V vocabulary, W window, P prefix, M rows of a matrix (of which T are independent),
E memories to route to, S of which a token goes to, and to a shared one. Of attention over chunks, C is the tokens of a
chunk, S the chunks that a query reads, and R the queries that choose them together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from .. import (
    ChunkLayout,
    MemorySpec,
    chunk_attention,
    combine,
    delta_rule,
    dispatch,
    grouped_linear,
    l2_norm,
    linear_attention,
    linear_cross_entropy,
    neural_memory,
    newton_schulz,
    rms_norm,
    route,
    select_chunks,
    short_conv,
    window_attention,
)
from ..op import OPERATIONS, Cost
from .draw import Draw
from .sizes import Sizes

Build = Callable[[Draw, Sizes], dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """One way of calling one operation.

    ``build(draw, sizes)`` gives the keyword arguments of ``function``; ``cost(sizes, itemsize)`` the costs of forward
    and backward. ``sizes`` are the documented ones, ``small`` those for a CPU, ``check`` those at which results are
    compared with the token-by-token reference. ``exact``: distance from it that rounding in float32 may cause;
    ``half``: how many times that of other operations it is in half precision.
    """

    name: str
    function: Callable[..., Any]
    build: Build
    cost: Callable[[Sizes, int], tuple[Cost, Cost]]
    sizes: Sizes
    small: Sizes
    check: Sizes
    options: Mapping[str, Any] = field(default_factory=dict)
    exact: float = 1e-5
    half: float = 1.0

    @property
    def operation(self) -> str:
        """The registered operation."""
        return self.name.partition("/")[0]

    def arguments(self, draw: Draw, sizes: Sizes) -> dict[str, Any]:
        """Keyword arguments, tensors only drawn, of sizes."""
        return {**self.build(draw, sizes), **self.options}

    def run(self, arguments: Mapping[str, Any], backend: str | None) -> Tensor:
        """The output alone."""
        result = self.function(**arguments, backend=backend)
        return result[0] if isinstance(result, tuple) else result


def leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, their floating tensors wanting gradients."""
    return tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point()), dict(arguments))


def floats(arguments: Any) -> list[Tensor]:
    """The floating tensors of nested arguments."""
    return [x for x in tree_flatten(arguments)[0] if isinstance(x, Tensor) and x.is_floating_point()]


def moved(arguments: Mapping[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The arguments on a device; floating tensors in ``dtype``, gates not below float32."""

    def move(x: Tensor, gate: bool) -> Tensor:
        kind = torch.promote_types(dtype, torch.float32) if gate else dtype
        return x.to(device, kind if x.is_floating_point() else x.dtype)

    return {name: tree_map_only(Tensor, partial(move, gate=name in GATES), value) for name, value in arguments.items()}


GATES = {"step", "log_retain", "log_momentum", "gamma", "delta", "beta", "log_decay"}


def _memory(draw: Draw, sizes: Sizes, spec: MemorySpec) -> dict[str, Any]:
    """Gates as a layer of models/ gives them at its start, so that the recurrence is stable at every length."""
    b, t, h, d = (sizes[name] for name in "BTHD")
    shapes = spec.weight_shapes(h, d, d)
    size = 0.1 / (spec.chunk_size * len(shapes))
    gates = (b, t, h, d) if spec.gates == "channel" else (b, t, h)
    spread = [1.0 if spec.norm else (4 / s[2] if len(shapes) > 1 else 1 / d) ** 0.5 for s in shapes]
    return {
        "q": draw.unit(b, t, h, d),
        "k": draw.unit(b, t, h, d),
        "v": draw.normal(b, t, h, d),
        "step": draw.gate(0.5 * size, size, *gates),
        "log_retain": draw.gate(-1e-3, -1e-4, *gates) if spec.retention_gate else None,
        "log_momentum": draw.gate(-0.3, -0.1, *gates) if spec.momentum_gate else None,
        "gamma": draw.gate(0.1, 1.0, b, t, h) if spec.window > 1 else None,
        "delta": draw.gate(1.0, 4.0, b, t, h) if spec.bias == "huber" else None,
        "weights": [draw.normal(*shape, scale=s) for shape, s in zip(shapes, spread, strict=True)],
        "norm": draw.normal(h, d) if spec.norm else None,
    }


def _memory_cost(sizes: Sizes, itemsize: int, spec: MemorySpec) -> tuple[Cost, Cost]:
    b, t, h, d = (sizes[name] for name in "BTHD")
    of = partial(OPERATIONS["neural_memory"].cost, b, t, h, d, d, spec, itemsize=itemsize)
    return of(), of(backward=True)


def _linear(draw: Draw, sizes: Sizes, delta: bool) -> dict[str, Any]:
    b, t, h, d = (sizes[name] for name in "BTHD")
    tokens = {"q": draw.unit(b, t, h, d), "k": draw.unit(b, t, h, d), "v": draw.normal(b, t, h, d)}
    gates = {"beta": draw.gate(0.1, 1.0, b, t, h)} if delta else {}
    return {**tokens, **gates, "log_decay": draw.gate(-0.1, -0.001, b, t, h)}


def _linear_cost(sizes: Sizes, itemsize: int, operation: str) -> tuple[Cost, Cost]:
    b, t, h, d = (sizes[name] for name in "BTHD")
    of = partial(OPERATIONS[operation].cost, b, t, h, d, d, itemsize=itemsize)
    return of(), of(backward=True)


def _attention(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    b, t, h, g, d, p = (sizes[name] for name in "BTHGDP")
    prefix = (draw.normal(p, g, d), draw.normal(p, g, d)) if p else None
    k, v = draw.normal(b, t, g, d), draw.normal(b, t, g, d)
    return {"q": draw.normal(b, t, h, d), "k": k, "v": v, "prefix": prefix, "window": sizes["W"] or None}


def _attention_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    b, t, h, g, d = (sizes[name] for name in "BTHGD")
    of = partial(OPERATIONS["window_attention"].cost, (b, t, h, d), (b, t, g, d), itemsize=itemsize)
    of = partial(of, window=sizes["W"] or None, prefix=sizes["P"])
    return of(), of(backward=True)


def _loss(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    b, t, d, v = (sizes[name] for name in "BTDV")
    return {"x": draw.normal(b, t, d), "weight": draw.normal(v, d, scale=d**-0.5), "target": draw.integers(v, b, t)}


def _convolution(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    b, t, c, k = (sizes[name] for name in "BTCK")
    return {"x": draw.normal(b, t, c), "weight": draw.normal(c, k, scale=k**-0.5)}


def _matrices(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    return {"x": draw.normal(*(sizes[name] for name in "BTHMD"))}


def _rows(draw: Draw, sizes: Sizes, names: tuple[str, ...]) -> dict[str, Any]:
    shape = [sizes[name] for name in "BTHD" if name in sizes]
    made = {"x": draw.normal(*shape), "gate": draw.normal(*shape), "weight": draw.normal(shape[-1])}
    return {name: made[name] for name in names}


def _shaped_cost(
    sizes: Sizes, itemsize: int, operation: str, shapes: tuple[str, ...], **given: Any
) -> tuple[Cost, Cost]:
    """Costs of an operation that takes the shapes of its tensors."""
    every = [tuple(sizes[name] for name in letters if name in sizes) for letters in shapes]
    of = partial(OPERATIONS[operation].cost, *every, itemsize=itemsize, **given)
    return of(), of(backward=True)


def _routed(draw: Draw, sizes: Sizes, operation: str) -> dict[str, Any]:
    b, t, memories, top_k, c = (sizes[name] for name in "BTESC")
    more = {
        "route": {},
        "dispatch": {"x": draw.normal(b, t, c)},
        "combine": {"x": draw.normal(1, b * t * (top_k + 1), c)},
        "grouped_linear": {"x": draw.normal(b, t, c), "weight": draw.normal(memories + 1, c, c, scale=c**-0.5)},
    }
    return {"logits": draw.normal(b, t, memories), "top_k": top_k, **more[operation]}


def _route_and(
    logits: Tensor, top_k: int, x: Tensor | None = None, weight: Tensor | None = None, *, backend: str | None,
    operation: str,
) -> Tensor:  # fmt: skip
    """An operation of routed tokens after the routing itself, of which the weights are the output."""
    routing = route(logits, top_k, shared=True, backend=backend)
    if x is None:
        return routing.weight
    if weight is not None:
        return grouped_linear(x, weight, routing, backend)
    return (combine if operation == "combine" else dispatch)(x, routing, backend)


def _routed_cost(sizes: Sizes, itemsize: int, operation: str) -> tuple[Cost, Cost]:
    """Costs of an operation and of its routing, whose gradient some operations have no use for."""
    b, t, memories, top_k, c = (sizes[name] for name in "BTESC")
    slots, choices = b * t * (top_k + 1), top_k + 1
    shapes: dict[str, tuple[Any, ...]] = {
        "dispatch": ((b, t, c), choices),
        "combine": ((1, slots, c), (b, t, choices)),
        "grouped_linear": ((b, t, c), (memories + 1, c, c), choices),
    }
    own = partial(OPERATIONS["route"].cost, (b, t, memories), top_k, itemsize=itemsize)
    forward, backward = own(), own(backward=True) if operation in ("route", "combine") else Cost(0, 0)
    if operation in shapes:
        of = partial(OPERATIONS[operation].cost, *shapes[operation], itemsize=itemsize)
        forward, backward = forward + of(), backward + of(backward=True)
    return forward, backward


def _chunks(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    b, t, h, d, g, c, kept, share = (sizes[name] for name in "BTHDGCSR")
    tokens = {"q": draw.normal(b, t, h, d), "k": draw.normal(b, t, g, d), "v": draw.normal(b, t, g, d)}
    summaries = {"summary_q": draw.normal(b, t, 1, d), "summary_k": draw.normal(b, -(-t // c), 1, d)}
    return {**tokens, **summaries, "top_k": kept, "chunk_size": c, "share": share}


def _chunks_cost(sizes: Sizes, itemsize: int, read: str) -> tuple[Cost, Cost]:
    """Costs of the attention, and forward of the choice."""
    b, t, h, d, g, c, kept, share = (sizes[name] for name in "BTHDGCSR")
    shapes = (b, t, h, d), (b, t, g, d), (b, t, 1, d), (b, -(-t // c), 1, d)
    of = partial(OPERATIONS["chunk_attention"].cost, *shapes, kept, chunk_size=c, union=read == "union")
    choice = OPERATIONS["select_chunks"].cost(*shapes[2:], kept, share=share, itemsize=itemsize)
    return of(itemsize=itemsize) + choice, of(itemsize=itemsize, backward=True)


def _choice(
    summary_q: Tensor, summary_k: Tensor, top_k: int, chunk_size: int, share: int, *, backend: str | None
) -> Tensor:  # fmt: skip
    """Relevance of the chosen chunks, which alone has gradients."""
    batch, length = summary_q.shape[:2]
    layout = ChunkLayout.regular(batch, length, chunk_size, share, summary_q.device)
    chosen = select_chunks(summary_q, summary_k, layout, top_k, backend=backend).long()
    read = summary_k.flatten(0, 1)[chosen.clamp(min=0), torch.arange(summary_q.shape[2], device=chosen.device)[:, None]]
    return torch.where(chosen < 0, 0.0, (read * summary_q[..., None, :]).sum(-1))


def _choice_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    """Costs of the choice, and of the relevance of what is chosen."""
    b, t, d, c, kept, share = (sizes[name] for name in "BTDCSR")
    shapes = (b, t, 1, d), (b, -(-t // c), 1, d)
    of = OPERATIONS["select_chunks"].cost(*shapes, kept, share=share, itemsize=itemsize)
    return of, Cost(4 * b * t * kept * d, itemsize * b * t * (2 + kept) * d)


HEADS: Sizes = {"B": 8, "T": 4096, "H": 16, "D": 64}
FEW: Sizes = {"B": 1, "T": 512, "H": 4, "D": 64}
TINY: Sizes = {"B": 2, "T": 147, "H": 2, "D": 64}


def _memories() -> list[Workload]:
    specs = {
        "mlp_f256_c64": MemorySpec(expansion=4, chunk_size=64),
        "mlp_f64_c64": MemorySpec(expansion=1, chunk_size=64),
        "linear_c64": MemorySpec(network="linear", depth=1, norm=False, residual=False, chunk_size=64),
        "mlp_lp_c64": MemorySpec(bias="lp"),
        "mlp_huber_c64": MemorySpec(bias="huber"),
        "mlp_lq_c64": MemorySpec(retention="lq"),
        "mlp_kl_c64": MemorySpec(retention="kl"),
        "mlp_norm_c64": MemorySpec(retention="norm"),
        "mlp_window4_c64": MemorySpec(window=4),
        "mlp_muon_c64": MemorySpec(rule="muon"),
        "mlp_muon_window4_c64": MemorySpec(rule="muon", window=4),
        "gated_mlp_c64": MemorySpec(network="gated_mlp"),
        "mlp_depth3_c64": MemorySpec(depth=3),
        "mlp_channel_c64": MemorySpec(gates="channel"),
    }
    return [
        Workload(
            f"neural_memory/{name}",
            neural_memory,
            partial(_memory, spec=spec),
            partial(_memory_cost, spec=spec),
            HEADS,
            FEW,
            TINY,
            {"spec": spec},
            exact=1e-4 if spec.norm else 1e-5,  # LayerNorm: 1/std³ once per token in the inner gradient's derivative
        )
        for name, spec in specs.items()
    ]


def _chunked() -> list[Workload]:
    sizes = {"G": 4, "C": 64, "S": 16, "R": 64}
    attend = [
        Workload(
            f"chunk_attention/{read}_c64_top16",
            chunk_attention,
            _chunks,
            partial(_chunks_cost, read=read),
            {**HEADS, **sizes},
            {**FEW, **sizes, "C": 32, "S": 4},
            {**TINY, **sizes, "G": 1, "C": 8, "S": 3, "R": 8},
            {"read": read},
        )
        for read in ("two_level", "union")
    ]
    names = ("summary_q", "summary_k", "top_k", "chunk_size", "share")
    choose = replace(
        attend[0],
        name="select_chunks/c64_top16",
        function=_choice,
        build=lambda draw, sizes: {name: x for name, x in _chunks(draw, sizes).items() if name in names},
        cost=_choice_cost,
        options={},
    )
    return [*attend, choose]


def _made() -> list[Workload]:
    linear = [
        Workload(
            f"{function.__name__}/gated_d{sizes['D']}_c64",
            function,
            partial(_linear, delta=function is delta_rule),
            partial(_linear_cost, operation=function.__name__),
            sizes,
            {**FEW, "D": sizes["D"]},
            {**TINY, "D": sizes["D"]},
        )
        for function in (delta_rule, linear_attention)
        for sizes in (HEADS, {"B": 4, "T": 8192, "H": 32, "D": 128})
    ]
    window = Workload(
        "window_attention/w512_p16",
        window_attention,
        _attention,
        _attention_cost,
        {**HEADS, "G": 4, "W": 512, "P": 16},
        {**FEW, "G": 4, "W": 128, "P": 16},
        {**TINY, "G": 1, "W": 48, "P": 16},
    )
    causal = replace(
        window,
        name="window_attention/causal",
        sizes={**HEADS, "G": 16, "W": 0, "P": 0},
        small={**FEW, "G": 4, "W": 0, "P": 0},
        check={**TINY, "G": 2, "W": 0, "P": 0},
    )
    channels = {"B": 8, "T": 4096, "C": 1024, "K": 4}
    width = {"B": 8, "T": 4096, "D": 1024}
    routed = [
        Workload(
            f"{operation}/e4_top2_shared",
            partial(_route_and, operation=operation),
            partial(_routed, operation=operation),
            partial(_routed_cost, operation=operation),
            {"B": 8, "T": 4096, "E": 4, "S": 2, "C": 1024},
            {"B": 1, "T": 512, "E": 4, "S": 2, "C": 256},
            {"B": 2, "T": 37, "E": 4, "S": 2, "C": 64},
        )
        for operation in ("route", "dispatch", "combine", "grouped_linear")
    ]
    return [
        *_memories(),
        *_chunked(),
        *routed,
        *linear,
        window,
        causal,
        Workload(
            "linear_cross_entropy/v128k",
            linear_cross_entropy,
            _loss,
            partial(_shaped_cost, operation="linear_cross_entropy", shapes=("BTD", "VD")),
            {"B": 8, "T": 4096, "D": 1024, "V": 131072},
            {"B": 1, "T": 512, "D": 128, "V": 4096},
            {"B": 2, "T": 50, "D": 64, "V": 500},
        ),
        Workload(
            "short_conv/k4_silu",
            short_conv,
            _convolution,
            partial(_shaped_cost, operation="short_conv", shapes=("BTC", "CK")),
            channels,
            {**channels, "B": 1, "T": 512},
            {**channels, "B": 2, "T": 147, "C": 64},
            {"activation": "silu"},
        ),
        Workload(
            "rms_norm/d1024",
            rms_norm,
            partial(_rows, names=("x", "weight")),
            partial(_shaped_cost, operation="rms_norm", shapes=("BTD",), weight=True),
            width,
            {**width, "B": 1, "T": 512},
            {"B": 2, "T": 37, "D": 1024},
        ),
        Workload(
            "rms_norm/gated_d64",
            rms_norm,
            partial(_rows, names=("x", "weight", "gate")),
            partial(_shaped_cost, operation="rms_norm", shapes=("BTHD",), weight=True, gate=True),
            HEADS,
            FEW,
            TINY,
        ),
        Workload(
            "l2_norm/d64",
            l2_norm,
            partial(_rows, names=("x",)),
            partial(_shaped_cost, operation="l2_norm", shapes=("BTHD",)),
            HEADS,
            FEW,
            TINY,
        ),
        Workload(
            "newton_schulz/m64_n64",
            newton_schulz,
            _matrices,
            partial(_shaped_cost, operation="newton_schulz", shapes=("BTHMD",)),
            {"B": 8, "T": 64, "H": 16, "M": 64, "D": 64},
            {"B": 1, "T": 8, "H": 4, "M": 64, "D": 64},
            {"B": 1, "T": 2, "H": 2, "M": 64, "D": 64},
            exact=1e-4,  # small singular values grow 3.4 times in each of five steps, and rounding with them
            half=4.0,
        ),
    ]


WORKLOADS = {workload.name: workload for workload in _made()}


def selected(only: list[str]) -> list[Workload]:
    """The workloads whose name holds one of these texts; all for none.

    Raises:
        ValueError: when there is none.
    """
    found = [w for w in WORKLOADS.values() if not only or any(text in w.name for text in only)]
    if not found:
        raise ValueError(f"workloads were {only}; they must match some of {sorted(WORKLOADS)}")
    return found
