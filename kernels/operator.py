"""Registered operators whose bodies see the dtypes they were given, and what a missing gradient looks like there."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._pytree import tree_leaves


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a pure function as ``palimpsest::name``, run with autocast off.

    Under autocast the products inside a body would change dtype behind the back of its fake implementation, which
    promises the dtypes of the arguments.
    """

    def define(function: Callable[..., Any]) -> CustomOpDef:
        @wraps(function)
        def body(*args: Any, **kwargs: Any) -> Any:
            where = next(leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            if not torch.is_autocast_enabled(where):
                return function(*args, **kwargs)
            with torch.autocast(where, enabled=False):
                return function(*args, **kwargs)

        return torch.library.custom_op(f"palimpsest::{name}", body, mutates_args=())

    return define


def absent(like: Tensor) -> Tensor:
    """What an operator returns in the place of a tensor that does not exist: its schema has no optional outputs."""
    return like.new_empty(0)


def present(gradients: list[Tensor] | tuple[Tensor, ...], inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients for autograd, with None where the input itself was None."""
    return [None if x is None else gradient for gradient, x in zip(gradients, inputs, strict=True)]
