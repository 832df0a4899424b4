"""One softmax over one or several lists of keys, of each of which a query sees an interval. An operator of PyTorch,
which torch.compile takes as it is, and so is its backward.

    forward   interval_forward for each list; more than one: o = Σ_n e^{lse_n − lse} o_n with lse of all
    backward  normaliser → interval_backward_dq, interval_backward_dkv for each, with the lse of all
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.merge_softmax import joined
from lcpt_kernels.triton.common.delta import backward_delta
from lcpt_kernels.triton.common.tensors import on_device_of, with_rows
from lcpt_kernels.triton.interval.backward_dkv import interval_backward_dkv
from lcpt_kernels.triton.interval.backward_dq import interval_backward_dq
from lcpt_kernels.triton.interval.forward import interval_forward
from lcpt_kernels.triton.interval.intervals import Intervals, Part

NAME = "sparse and low-rank attention"  # in errors


def interval_attention(
    parts: list[tuple[Tensor, Tensor, Tensor, Intervals]], scale: float, log_mass: list[float] | None = None
) -> Tensor:
    """A softmax of scale · q·k + log_mass over all that a query sees in any of the parts: q [B, T, H, ·],
    k [B, S, Hkv, ·], v [B, S, Hkv, Dv], whose Dv and T, and D within a part, are the same; fp32, bf16 or fp16.
    -> o [B, T, H, Dv] in q's dtype, 0 for a query that sees none."""
    refuse_transforms(NAME, "reference")
    q, k, v, intervals = zip(*parts, strict=True)
    lists = [x for of_part in intervals for x in of_part]
    o, _ = torch.ops.lcpt_kernels.interval_attention(q, k, v, lists, scale, log_mass or [0.0] * len(parts))
    return o


class Call(NamedTuple):
    """The arguments of both operators, part by part; lists: the four of each."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    lists: list[Tensor]
    scale: float
    log_mass: list[float]

    def parts(self) -> list[Part]:
        q, k, v = ([with_rows(x) for x in side] for side in self[:3])
        intervals = [Intervals(*self.lists[n : n + 4]) for n in range(0, len(self.lists), 4)]
        return [Part(*of_part, self.scale) for of_part in zip(q, k, v, intervals, strict=True)]


ARGUMENTS = "Tensor[] q, Tensor[] k, Tensor[] v, Tensor[] lists, float scale, float[] log_mass"


@torch.library.custom_op(
    "lcpt_kernels::interval_attention", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor o, Tensor lse)"
)
def forward(*arguments):
    """-> o; lse [B, T, H] fp32, −∞ for a query that sees none."""
    call = Call(*arguments)
    with on_device_of(call.q[0]):
        parts = call.parts()
        type = call.q[0].dtype
        if len(parts) == 1 and call.log_mass[0] == 0:
            return interval_forward(parts[0], type)
        outputs = [interval_forward(part, torch.float32) for part in parts]
        o, lse = joined([(o, lse + mass) for (o, lse), mass in zip(outputs, call.log_mass, strict=True)])
        return o.to(type), lse


@forward.register_fake
def _(*arguments):
    call = Call(*arguments)
    lse = call.q[0].new_empty(call.q[0].shape[:3], dtype=torch.float32)
    return call.q[0].new_empty(*lse.shape, call.v[0].shape[3]), lse


@torch.library.custom_op(
    "lcpt_kernels::interval_attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor o, Tensor lse, {ARGUMENTS}) -> Tensor[]",
)
def backward(do, o, lse, *arguments):
    """-> the gradients of q, of k and of v, of all parts each."""
    call = Call(*arguments)
    dq, dk, dv = [], [], []
    with on_device_of(do):
        do = with_rows(do)
        delta = backward_delta(do, o)
        for part, mass in zip(call.parts(), call.log_mass, strict=True):
            own = lse if mass == 0 else lse - mass
            dq.append(interval_backward_dq(part, do, own, delta))
            from_keys = part._replace(intervals=part.intervals.seen_from_keys())
            for dx, side in zip(interval_backward_dkv(from_keys, do, own, delta), (dk, dv), strict=True):
                side.append(dx)
    return dq + dk + dv


@backward.register_fake
def _(do, o, lse, *arguments):
    call = Call(*arguments)
    return [x.new_empty(x.shape) for side in call[:3] for x in side]


def save(ctx, inputs, output):
    call = Call(*inputs)
    ctx.save_for_backward(*output, *call.q, *call.k, *call.v, *call.lists)
    ctx.numbers = len(call.q), call.scale, call.log_mass


def differentiate(ctx, do, _):
    o, lse, *tensors = ctx.saved_tensors
    n, *numbers = ctx.numbers
    q, k, v, lists = tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n :]
    gradients = torch.ops.lcpt_kernels.interval_attention_backward(do, o, lse, q, k, v, lists, *numbers)
    return gradients[:n], gradients[n : 2 * n], gradients[2 * n :], [None] * len(lists), None, None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "reference"))
