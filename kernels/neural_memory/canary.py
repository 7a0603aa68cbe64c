"""Small problems with a known answer, one for each set of a kernel's constants: Triton against the plain torch path."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..launch import Pairs
from .spec import MemorySpec
from .state import state_names

#: What follows the name of the bias lp in the constant ``BIAS``: p, ν and ε.
LP = ("lp_power", "lp_sharpness", "lp_smoothing")
#: The gates that a memory may have beside its step.
GATES = ("log_retain", "log_momentum", "gamma", "delta")


def spec_of(constants: Mapping[str, Any]) -> MemorySpec:
    """The memory that a kernel's constants compute; what it is not built for, it has as usual."""
    bias, (settle, *power), (turn, *often) = constants["BIAS"], constants["SETTLE"], constants["TURN"]
    return MemorySpec(
        network={1: "linear", 2: "mlp", 3: "gated_mlp"}[constants["LAYERS"]],
        expansion=constants["F"] // constants["D"],
        norm=constants["NORM"],
        residual=constants["RESIDUAL"],
        bias=bias[0],
        **dict(zip(LP, bias[1:], strict=False)),
        **dict(zip(("lq_power",), power, strict=False)),
        retention=settle if settle != "none" else "l2" if constants.get("RETENTION", True) else "none",
        rule=turn if turn != "none" else "momentum" if constants["MOMENTUM"] else "gd",
        **({"ns_every": often[0], "ns_steps": often[1]} if often else {}),
        chunk_size=constants["CHUNK"],
        read_after_write=not constants.get("LATE", False),
        window=constants.get("WINDOW", 1),
    )


def problem(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``neural_memory`` in float32: unit keys and queries, gates that keep the recurrence stable.

    Three chunks and a rest, long enough for a state to be kept; where they may be, packed sequences and a state in the
    middle of a chunk.
    """
    from . import neural_memory

    spec = spec_of(constants)
    length = spec.chunk_size * (constants["EVERY"] + 2) + 3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator).to(device)

    heads, width = constants["H"], constants["D"]
    shape = (1, length, heads)
    q, k, v = (torch.randn((*shape, width), generator=generator).to(device) for _ in range(3))
    shapes = spec.weight_shapes(heads, width, width)
    # Weights of kl are positive, so outputs and steps are large where nothing normalises them; and decay makes them
    # equal: a LayerNorm of equal outputs is of rounding alone.
    logs = spec.retention == "kl"
    largest, decay = (0.1 / width, 0.1) if logs else (1.0, 1.0)
    given: dict[str, Any] = {
        "q": torch.nn.functional.normalize(q, dim=-1),
        "k": torch.nn.functional.normalize(k, dim=-1),
        "v": v,
        "step": uniform(0.1, 1.0, *shape) * largest / spec.chunk_size,
        "log_retain": uniform(-0.1, -0.001, *shape) * decay if spec.retention_gate else None,
        "log_momentum": uniform(-2.0, -0.2, *shape) if spec.momentum_gate else None,
        "gamma": uniform(0.2, 1.0, *shape) if spec.window > 1 else None,
        "delta": uniform(0.25, 1.5, *shape) * width**0.5 if spec.bias == "huber" else None,
        "weights": [torch.randn(s, generator=generator).to(device) * s[1] ** (0.0 if logs else -0.5) for s in shapes],
        "norm": uniform(0.5, 1.5, heads, width) if spec.norm else None,
        "spec": spec,
    }
    rows = 1
    if constants["PACKED"]:
        given["cu_seqlens"] = torch.tensor([0, 5, length], dtype=torch.int32, device=device)
        rows = 2
    if constants["STATE"]:
        few: dict[str, Any] = {
            name: x[:, :5].expand(rows, *x[:, :5].shape[1:])
            for name, x in given.items()
            if isinstance(x, Tensor) and name not in ("norm", "cu_seqlens")
        }
        rest: dict[str, Any] = {"weights": given["weights"], "norm": given["norm"], "spec": spec}
        none: dict[str, Any] = {name: None for name in GATES if given[name] is None}
        with torch.no_grad():
            given["state"] = neural_memory(**few, **rest, **none, return_state=True, backend="torch")[1]
    return given


def _leaves(given: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Any], list[Tensor]]:
    """The arguments with tokens in a dtype, all floats as fresh leaves, and these."""
    out, leaves = dict(given), []

    def leaf(x: Tensor, kind: torch.dtype) -> Tensor:
        leaves.append(x.detach().to(dtype).to(kind).requires_grad_())
        return leaves[-1]

    for name in ("q", "k", "v"):
        out[name] = leaf(given[name], dtype)
    for name in ("step", *GATES, "norm"):
        out[name] = None if given[name] is None else leaf(given[name], torch.float32)
    out["weights"] = [leaf(w, torch.float32) for w in given["weights"]]
    if "state" in given:
        out["state"] = {name: x if name == "position" else leaf(x, torch.float32) for name, x in given["state"].items()}
    return out, leaves


def pairs(given: dict[str, Any], constants: Mapping[str, Any], *, keep: bool = True, backward: bool = False) -> Pairs:
    """(found by Triton in the constants' dtype, wanted: by torch in float32 from the same numbers)."""
    from . import neural_memory

    dtype = getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[str(constants["DT"])])
    found_by: list[list[Tensor]] = []
    for backend in ("triton", "torch"):
        arguments, leaves = _leaves(given, dtype)
        if backend == "torch":
            for name in ("q", "k", "v"):
                arguments[name] = arguments[name].float()
        with torch.set_grad_enabled(keep):
            o, state = neural_memory(**arguments, return_state=True, backend=backend)
        assert state is not None
        found = [o, *(state[name] for name in state_names(given["spec"]))]
        if backward:
            weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.device)
            loss = (o.float() * weight).sum() + sum(x.square().sum() for x in found[1:])
            found = list(torch.autograd.grad(loss, leaves, materialize_grads=True))
        found_by.append([x.detach() for x in found])
    return [(a, b) for a, b in zip(*found_by, strict=True) if b.any()]


def forward_pairs(constants: Mapping[str, Any]) -> Pairs:
    """Output and state."""
    return pairs(problem(constants), constants, keep=False)


def backward_pairs(constants: Mapping[str, Any]) -> Pairs:
    """Every gradient."""
    return pairs(problem(constants), constants, backward=True)


def decode_pairs(constants: Mapping[str, Any]) -> Pairs:
    """Output and state of one token, the last of its chunk."""
    given = problem({**constants, "STATE": True, "PACKED": False, "EVERY": 1})
    for name in ("q", "k", "v", "step", *GATES):
        given[name] = None if given[name] is None else given[name][:, :1]
    given["state"]["position"] = torch.full_like(given["state"]["position"], constants["CHUNK"] - 1)
    return pairs(given, constants, keep=False)
