"""Registered operators whose bodies see the dtypes they were given, and what a missing gradient looks like there."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("palimpsest", "FRAGMENT")


class Operator:
    """``torch.ops.palimpsest.<name>``: a pure function of tensors and plain values, on every device.

    Registered through the parts of ``torch.library`` rather than its ``custom_op``, which walks arguments and results
    of every call for aliases: a tenth of a millisecond for a forward and its backward.
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.name, self.body = f"palimpsest::{name}", body
        schema = torch.library.infer_schema(body, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.palimpsest, name).default

    def __call__(self, *args: Any) -> Any:
        """Call the operator through the dispatcher."""
        return self.overload(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results, from those of the arguments."""
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """The backward, itself made of registered operators, and what it keeps of the forward."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Register a pure function as ``palimpsest::name``, run with autocast off.

    Under autocast the products inside a body would change dtype behind the back of its fake implementation, which
    promises the dtypes of the arguments.
    """

    def define(function: Callable[..., Any]) -> Operator:
        @wraps(function)
        def body(*args: Any, **kwargs: Any) -> Any:
            where = next(x.device.type for x in args if isinstance(x, Tensor))
            if not torch.is_autocast_enabled(where):
                return function(*args, **kwargs)
            with torch.autocast(where, enabled=False):
                return function(*args, **kwargs)

        return Operator(name, body)

    return define


def absent(like: Tensor) -> Tensor:
    """What an operator returns in the place of a tensor that does not exist: its schema has no optional outputs."""
    return like.new_empty(0)


def present(gradients: list[Tensor] | tuple[Tensor, ...], inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients for autograd, with None where the input itself was None."""
    return [None if x is None else gradient for gradient, x in zip(gradients, inputs, strict=True)]
