"""Functions of tensors that PyTorch cannot look into: operators for whoever traces, plain functions for everyone else.

As a custom operator, a kernel is known to `torch.compile`, fake tensors, `torch.func` and dispatch modes. The way
through the dispatcher takes the host longer than launching the kernel, so a plain call on plain tensors skips it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Opaque:
    """A function registered as a custom operator, and how it is called.

    overload: the operator. function: what computes it. Both take positional arguments alone.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self._registered = torch.library.custom_op(name, mutates_args=())(function)
        space, own = name.split("::")
        self.overload = getattr(getattr(torch.ops, space), own).default
        self._differentiable: type[torch.autograd.Function] | None = None

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What the results look like, as for `torch.library.custom_op`; also a decorator."""
        return self._registered.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """The gradients, as for `torch.library.custom_op`; of positional arguments alone."""
        self._registered.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *arguments: Any) -> Any:  # PyTorch takes long to call one with a set-up of its own
            output = self.function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._differentiable = type(self.function.__name__, (torch.autograd.Function,), parts)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _watched() or not all(map(_is_plain, _tensors(arguments))):
            return self.overload(*arguments)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(arguments))):
            return self.function(*arguments)
        if self._differentiable is None:  # the operator says so, when its gradient is asked for
            return self.overload(*arguments)
        return self._differentiable.apply(*arguments)


def opaque(name: str) -> Callable[[Callable[..., Any]], Opaque]:
    """Decorator: the function as `Opaque` of this qualified name. Its annotations are those of a custom operator."""
    return lambda function: Opaque(name, function)


def _watched() -> bool:
    """Whether someone is to see operators: a dispatch mode, a transform of `torch.func`, `torch.jit.trace`."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta


def _tensors(arguments: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from (entry for entry in argument if isinstance(entry, torch.Tensor))
