"""Registered operators whose bodies see the dtypes they were given, and what a missing gradient looks like there."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library("palimpsest", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """``torch.ops.palimpsest.<name>``: a pure function of tensors and plain values, on every device.

    Registered through the parts of ``torch.library`` rather than its ``custom_op``, which walks arguments and results
    of every call for aliases. In plain eager mode not even the dispatcher is asked: see :meth:`__call__`.
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.name, self.body = f"palimpsest::{name}", body
        schema = torch.library.infer_schema(body, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.palimpsest, name).default
        self.nested = "[]" in schema.split("->")[0]  # autograd.Function does not look for tensors inside of lists
        self.function: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        """Call the operator: by the dispatcher wherever someone may be looking (a compiler, a counter, a tensor
        subclass), else the body itself, under an autograd.Function with the same backward."""
        if not plain(args):
            return self.overload(*args)
        if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in _flat(args)):
            return self.body(*args)
        if self.function is None or self.nested:
            return self.overload(*args)
        return self.function.apply(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results, from those of the arguments."""
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """The backward, itself made of registered operators, and what it keeps of the forward."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_LIBRARY)

        def forward(ctx: Any, *args: Any) -> Any:
            # Not a setup_context of its own: with one, every call binds its arguments to a signature, for 0.1 ms.
            output = self.body(*args)
            setup_context(ctx, args, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        self.function = type(self.name.split("::")[1], (torch.autograd.Function,), parts)


def _flat(args: tuple[Any, ...]) -> Iterator[Any]:
    for x in args:
        if isinstance(x, list | tuple):
            yield from x
        else:
            yield x


def plain(args: tuple[Any, ...]) -> bool:
    """Whether nothing but eager autograd can see a call: no compiler, mode, subclass or meta tensor."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return not any(isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta) for x in _flat(args))


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
