"""Functions with a backward pass by hand have a first derivative in reverse mode. All others are an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch.autograd import Function, forward_ad


def refuse_transforms(name: str, others: str) -> None:
    """Raise ValueError inside a torch.func transform or forward-mode AD, which `name` does not support; `others` is the
    backend that does."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise ValueError(
            f"{name} takes no torch.func transform and no forward-mode derivative, backend {others} does; "
            "what vmap would add may be a part of B"
        )


def no_second_derivative(name: str, others: str) -> Callable:
    """Return the derivative of a backward pass that has none: it raises ValueError; `others` is the backend that has
    one."""

    def refuse(ctx, *_):
        raise ValueError(f"{name} has no second derivative, backend {others} has")

    return refuse


def first_derivative_only(name: str, others: str) -> Callable[[Callable], Callable]:
    """Decorate the backward method of an autograd.Function: with create_graph=True the gradients are right, and a
    second derivative is an error."""

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def run(ctx, *d_outputs):
            with torch.no_grad():
                gradients = backward(ctx, *d_outputs)
            if not torch.is_grad_enabled():
                return gradients
            return _Last.apply(no_second_derivative(name, others), gradients, *ctx.saved_tensors, *d_outputs)

        return run

    return decorate


class _Last(Function):
    """Return `gradients` unchanged, with `refuse` as their derivative by `sources`."""

    @staticmethod
    def forward(ctx, refuse, gradients, *sources):
        ctx.refuse = refuse
        return gradients

    @staticmethod
    def backward(ctx, *_):
        ctx.refuse(ctx)
