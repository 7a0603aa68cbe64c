"""Small problems with a known answer for the kernels of the linear memories: the plain torch path in float32."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import Pairs
from . import operator


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that has these constants: rows of two and a half chunks, or documents of 0 to 2 chunks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.Generator(device).manual_seed(0)
    chunk, heads, kind = constants["C"], constants["H"], getattr(torch, constants["DTYPE"])
    packed = constants["PACKED"]
    batch, length = (1, 4 * chunk + 4) if packed else (2, 2 * chunk + chunk // 2)
    borders = torch.tensor([0, 0, 1, chunk + 1, 3 * chunk + 4, length], dtype=torch.int32, device=device)
    rows = 5 if packed else batch

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device)

    def tokens(width: int, stride: int, unit: bool = False) -> Tensor:
        x = draw(batch, length, heads, width)
        x = F.normalize(x, dim=-1) if unit else x
        return F.pad(x.flatten(2), (0, stride - heads * width)).to(kind)[..., : heads * width].unflatten(2, (heads, -1))

    d, dv = constants["D"], constants["DV"]
    return {
        "q": tokens(d, constants["Q_STRIDE"]),
        "k": tokens(d, constants["K_STRIDE"], unit=True),
        "v": tokens(dv, constants["V_STRIDE"]),
        "beta": draw(batch, length, heads).sigmoid() if constants["DELTA"] else None,
        "log_decay": F.logsigmoid(draw(batch, length, heads) + 2) if constants["DECAY"] else None,
        "state": draw(rows, heads, d, dv) if constants["STATE"] else None,
        "cu_seqlens": borders if packed else None,
        "scale": d**-0.5,
        "chunk": chunk,
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32."""
    return {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def _compare(launch: Callable[..., tuple[Any, ...]], constants: Mapping[str, Any]) -> Pairs:
    """Output and final memory. The latter is float32, of products of rounded operands: it is compared rounded."""
    arguments = problem(constants)
    found = launch(**arguments)[:2]
    exact = wide(arguments)
    wanted = operator.linear_memory_op.body(*exact.values(), False, False)[:2]
    return [(x.to(arguments["q"].dtype), y) for x, y in zip(found, wanted, strict=True)]


def forward(constants: Mapping[str, Any]) -> Pairs:
    """Output and final memory of the kernels in chunks."""
    from .forward import forward as launch

    return _compare(launch, constants)


def decode(constants: Mapping[str, Any]) -> Pairs:
    """Output and final memory of the kernel that goes token by token: rows of 10 tokens, documents of up to 9."""
    from .decode import decode as launch

    return _compare(launch, {**constants, "C": 4})


def backward(constants: Mapping[str, Any]) -> Pairs:
    """Every gradient, of a random weighting of output and final memory."""
    from .backward import backward as launch
    from .forward import forward as forwards

    arguments = problem(constants)
    inputs: list[Any] = [arguments[name] for name in ("q", "k", "v", "beta", "log_decay", "state")]
    scale, chunk = arguments["scale"], arguments["chunk"]
    o, final, *kept = forwards(**arguments)
    source = torch.Generator(o.device).manual_seed(1)
    grads: list[Any] = [torch.randn(x.shape, generator=source, device=o.device).to(x.dtype) for x in (o, final)]
    every: list[Any] = [*grads, *inputs, arguments["cu_seqlens"], *kept, scale, chunk]
    found = launch(*every)
    # The operators' bodies, not the operators: a canary runs inside one, where autograd is off.
    exact: list[Any] = [None if x is None else x.float() for x in inputs]
    _, _, *held = operator.linear_memory_op.body(*exact, arguments["cu_seqlens"], scale, chunk, True, False)
    wanted = operator.linear_memory_backward_op.body(
        *(x.float() for x in grads), *exact, arguments["cu_seqlens"], *held, scale, chunk, False
    )
    kind = o.dtype
    return [(x.to(kind), y) for x, y in zip(found, wanted, strict=True) if x is not None]
