"""One softmax over one or several lists of keys; a query sees an interval of each. It and its backward pass are
operators of PyTorch, which torch.compile does not look into.

    forward   interval_forward for each list; for several: o = Σ_n e^{lse_n − lse} o_n with lse of all
    backward  query_statistics → interval_backward_dq, interval_backward_dkv for each list, with the lse of all
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.merge_softmax import merge_outputs
from lcpt_kernels.triton.common.tensors import on_device_of, with_contiguous_rows
from lcpt_kernels.triton.interval.backward_dkv import interval_backward_dkv
from lcpt_kernels.triton.interval.backward_dq import interval_backward_dq
from lcpt_kernels.triton.interval.forward import interval_forward
from lcpt_kernels.triton.interval.intervals import Part, SortedIntervals
from lcpt_kernels.triton.interval.statistics import query_statistics

NAME = "sparse and low-rank attention"  # in errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of both operators, in their order. Each list has one entry for each part."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    lists: list[Tensor]  # the four tensors of each part's SortedIntervals
    scale: float
    log_mass: list[float]  # added to the exponents of each part

    def parts(self) -> list[Part]:
        q, k, v = ([with_contiguous_rows(x) for x in side] for side in (self.q, self.k, self.v))
        intervals = [SortedIntervals(*self.lists[n : n + 4]) for n in range(0, len(self.lists), 4)]
        return [
            Part(q=q_n, k=k_n, v=v_n, intervals=intervals_n, scale=self.scale)
            for q_n, k_n, v_n, intervals_n in zip(q, k, v, intervals, strict=True)
        ]


SCHEMA_TYPES = {"list[Tensor]": "Tensor[]", "float": "float", "list[float]": "float[]"}
FIELDS = [field.name for field in fields(Call)]
ARGUMENTS = ", ".join(f"{SCHEMA_TYPES[str(field.type)]} {field.name}" for field in fields(Call))


def flatten(call: Call) -> list[Any]:
    """Return the arguments of the operators, in the order of the fields of Call."""
    return [getattr(call, name) for name in FIELDS]


def unflatten(arguments: tuple[Any, ...]) -> Call:
    """Return the Call of the operators' arguments: the inverse of flatten."""
    return Call(**dict(zip(FIELDS, arguments, strict=True)))


def interval_attention(
    parts: list[tuple[Tensor, Tensor, Tensor, SortedIntervals]], scale: float, log_mass: list[float] | None = None
) -> Tensor:
    """Return o [B, T, H, Dv] in q's dtype of one softmax of scale · q·k + log_mass over the keys of all parts.

    A part is q [B, T, H, ·], k [B, S, Hkv, ·], v [B, S, Hkv, Dv] in fp32, bf16 or fp16, and the intervals. T and Dv are
    those of all parts. o is 0 for a query that sees no key.
    """
    refuse_transforms(NAME, "reference")
    q, k, v, intervals = zip(*parts, strict=True)
    call = Call(
        q=list(q),
        k=list(k),
        v=list(v),
        lists=[x for part_intervals in intervals for x in part_intervals.tensors()],
        scale=scale,
        log_mass=log_mass or [0.0] * len(parts),
    )
    o, _ = torch.ops.lcpt_kernels.interval_attention(*flatten(call))
    return o


@torch.library.custom_op(
    "lcpt_kernels::interval_attention", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor o, Tensor lse)"
)
def forward(*arguments):
    """Return o and lse [B, T, H] fp32, −∞ for a query that sees no key."""
    call = unflatten(arguments)
    with on_device_of(call.q[0]):
        parts = call.parts()
        type = call.q[0].dtype
        if len(parts) == 1 and call.log_mass[0] == 0:
            return interval_forward(parts[0], type)
        outputs = [interval_forward(part, torch.float32) for part in parts]
        o, lse = merge_outputs([(o, lse + mass) for (o, lse), mass in zip(outputs, call.log_mass, strict=True)])
        return o.to(type), lse


@forward.register_fake
def _(*arguments):
    call = unflatten(arguments)
    lse = call.q[0].new_empty(call.q[0].shape[:3], dtype=torch.float32)
    return call.q[0].new_empty(*lse.shape, call.v[0].shape[3]), lse


@torch.library.custom_op(
    "lcpt_kernels::interval_attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor o, Tensor lse, {ARGUMENTS}) -> Tensor[]",
)
def backward(do, o, lse, *arguments):
    """Return the gradients of q of all parts, then those of k, then those of v."""
    call = unflatten(arguments)
    dq, dk, dv = [], [], []
    with on_device_of(do):
        do = with_contiguous_rows(do)
        for part, mass in zip(call.parts(), call.log_mass, strict=True):
            statistics = query_statistics(part, do, o, lse, mass)
            dq.append(interval_backward_dq(part, do, statistics))
            from_keys = replace(part, intervals=part.intervals.transposed())
            for dx, side in zip(interval_backward_dkv(from_keys, do, statistics), (dk, dv), strict=True):
                side.append(dx)
    return dq + dk + dv


@backward.register_fake
def _(do, o, lse, *arguments):
    call = unflatten(arguments)
    return [x.new_empty(x.shape) for side in (call.q, call.k, call.v) for x in side]


def save(ctx, inputs, output):
    call = unflatten(inputs)
    ctx.save_for_backward(*output, *call.q, *call.k, *call.v, *call.lists)
    ctx.constants = len(call.q), call.scale, call.log_mass


def differentiate(ctx, do, _):
    o, lse, *tensors = ctx.saved_tensors
    n, scale, log_mass = ctx.constants
    call = Call(
        q=tensors[:n],
        k=tensors[n : 2 * n],
        v=tensors[2 * n : 3 * n],
        lists=tensors[3 * n :],
        scale=scale,
        log_mass=log_mass,
    )
    gradients = torch.ops.lcpt_kernels.interval_attention_backward(do, o, lse, *flatten(call))
    return gradients[:n], gradients[n : 2 * n], gradients[2 * n :], [None] * len(call.lists), None, None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "reference"))
