"""What is differentiated by hand has one derivative, backwards: anything else is one error that says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch.autograd import Function, forward_ad


def refuse_transforms(name: str, others: str) -> None:
    """ValueError where PyTorch would transform `name`, which does not know it; others: the backend that does."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise ValueError(
            f"{name} takes no torch.func transform and no forward-mode derivative, backend {others} does; "
            "what vmap would add may be a part of B"
        )


def no_second_derivative(name: str, others: str) -> Callable:
    """The derivative of a backward pass that has none; others: the backend that has one."""

    def refuse(ctx, *_):
        raise ValueError(f"{name} has no second derivative, backend {others} has")

    return refuse


def first_derivative_only(name: str, others: str) -> Callable[[Callable], Callable]:
    """For the backward method of an autograd.Function: under create_graph=True the gradients are right, and to go
    through them once more is an error."""

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
    """`gradients` as they are, whose own derivative by what they come from is `refuse`."""

    @staticmethod
    def forward(ctx, refuse, gradients, *sources):
        ctx.refuse = refuse
        return gradients

    @staticmethod
    def backward(ctx, *_):
        ctx.refuse(ctx)
