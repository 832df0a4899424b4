"""The state of a sequence without its output, in Triton: the first of two passes with an exchange of states between.

    forward   block_state → scan, of which only the end is kept: the output pass scans again, from the state before
    backward  scan_backward of the end's gradient, added to that of what blocks added → block_backward_dv
              with a gate block_state → scan again, for what of the state goes through every block

Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative
from lcpt_kernels.triton.block_causal.autograd import (
    NAME,
    Call,
    additions,
    empty_additions,
    scan_states,
    states_at_block_starts,
)
from lcpt_kernels.triton.block_causal.backward_dv import block_backward_dv_state
from lcpt_kernels.triton.block_causal.gate import state_gate_gradient
from lcpt_kernels.triton.block_causal.local_weights import LocalWeight
from lcpt_kernels.triton.block_causal.scan import scan_backward
from lcpt_kernels.triton.block_causal.state_layout import to_common, to_common_backward
from lcpt_kernels.triton.common.tensors import on_device_of, trimmed_rows

ARGUMENTS = (
    "Tensor v, Tensor b, Tensor? state_v, Tensor? mass, Tensor? log_gate, int past, int summaries, "
    "float[] coefficients, int block_size, int local_blocks"
)
TENSORS = 5


def call_of(v, b, state_v, mass, log_gate, past, summaries, coefficients, block_size, local_blocks) -> Call:
    """Return a call of which only what concerns the state is read."""
    return Call(
        q=v[:, past:],
        k=v,
        v=v,
        a=b[:, :0],
        b=b,
        state_v=state_v,
        mass=mass,
        log_gate=log_gate,
        initial=None,
        value_added=None,
        denom_added=None,
        cu_seqlens=None,
        summaries=summaries,
        local_weight=LocalWeight.LINEAR.value,
        degree=0,
        coefficients=coefficients,
        scale=1.0,
        shift=0.0,
        offset=0.0,
        block_size=block_size,
        local_blocks=local_blocks,
        final=True,
        two_passes=True,
    )


@torch.library.custom_op(
    "lcpt_kernels::block_causal_state",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor value_added, Tensor denom_added, Tensor end)",
)
def forward(*arguments):
    """Return what blocks add to the state, as `additions` does, and S [B, Hkv, F, Dv + 1] fp32 after the keys."""
    call = call_of(*arguments)
    with on_device_of(call.v):
        problem = call.problem()
        added = additions(problem)
        value_end, denom_end = scan_states(problem, added, (None, None), (None, None))
        assert value_end is not None and denom_end is not None
        return *added, to_common(value_end, denom_end, call.layout, call.sketch)


@forward.register_fake
def _(*arguments):
    call = call_of(*arguments)
    return *empty_additions(call), call.empty_end()


@torch.library.custom_op(
    "lcpt_kernels::block_causal_state_backward",
    mutates_args=(),
    schema=f"(Tensor d_value_added, Tensor d_denom_added, Tensor d_end, {ARGUMENTS}) -> Tensor[]",
)
def backward(d_value_added, d_denom_added, d_end, *arguments):
    """Return the gradients of v, b, state_v, mass and log_gate, empty where there is none."""
    call = call_of(*arguments)
    with on_device_of(call.v):
        gradients = _backward(call, (d_value_added, d_denom_added), d_end)
    return [d_end.new_empty(0) if x is None else x for x in gradients]


def _backward(call: Call, d_added: tuple[Tensor, Tensor], d_end: Tensor) -> tuple[Tensor | None, ...]:
    p = call.problem()
    met = (None, None) if p.log_decay is None else states_at_block_starts(p, None, None)[:2]
    d_total, through = [], torch.zeros(p.blocks.count, p.v.shape[2], device=p.v.device)
    for d_x, d_x_end, weights, x_met in zip(
        d_added,
        to_common_backward(d_end, p.layout, call.sketch),
        p.layout.weights(p.v.device),
        met,
        strict=True,
    ):
        total = torch.zeros_like(d_x, memory_format=torch.contiguous_format)
        _, x_through = scan_backward(
            total, weights, p.log_decay, p.blocks, p.local_blocks, d_end=d_x_end, keep_before=False, met=x_met
        )
        d_total.append(total.add_(d_x))
        if x_through is not None:
            through += x_through
    gradients = block_backward_dv_state(p, *d_total)
    d_mass = d_log_gate = None
    if call.mass is not None and gradients.mass is not None:
        d_mass = gradients.mass.to(call.mass.dtype)
    if call.log_gate is not None:
        d_log_gate = state_gate_gradient(gradients.dgate_state, through, p.blocks, p.past, call.v.shape[1]).to(
            call.log_gate.dtype
        )
    return gradients.v, trimmed_rows(gradients.b, call.sketch), gradients.state_v, d_mass, d_log_gate


@backward.register_fake
def _(d_value_added, d_denom_added, d_end, *arguments):
    have = have_gradient(*arguments)
    return [
        x.new_empty(x.shape) if some else d_end.new_empty(0) for x, some in zip(arguments[:TENSORS], have, strict=True)
    ]


def have_gradient(v, b, state_v, mass, log_gate, *_) -> list[bool]:
    """Return which tensors the backward pass has the gradient of: v where it is what is added to the state."""
    return [state_v is None, True, state_v is not None, mass is not None, log_gate is not None]


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.constants = inputs[TENSORS:]


def differentiate(ctx, d_value_added, d_denom_added, d_end):
    arguments = (*ctx.saved_tensors, *ctx.constants)
    gradients = torch.ops.lcpt_kernels.block_causal_state_backward(d_value_added, d_denom_added, d_end, *arguments)
    found = [dx if some else None for dx, some in zip(gradients, have_gradient(*arguments), strict=True)]
    return *found, *(None for _ in ctx.constants)


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "reference"))
