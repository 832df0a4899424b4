"""The state of a sequence without its output, in Triton: the first of two passes with an exchange of states between.

    forward   state, of which only the end is kept: the output pass walks again, from the state before
    backward  Λ … Λ dS_N, added to the gradient of what blocks added, which the output pass has → block_backward_dv
              with a gate the states again, for what of dS_N goes through every block

The gradient of what blocks add needs something that it is the gradient of: two tensors of one element's memory.

Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpt_kernels.derivatives import no_second_derivative
from lcpt_kernels.triton.block_causal.autograd import (
    NAME,
    Call,
    empty_additions,
)
from lcpt_kernels.triton.block_causal.backward_dv import block_backward_dv_state
from lcpt_kernels.triton.block_causal.gate import state_gate_gradient
from lcpt_kernels.triton.block_causal.local_weights import LocalWeight
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.block_causal.state import States, states_at_block_starts
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
    """Return what stands for the blocks' additions to the state, and S [B, Hkv, F, Dv + 1] fp32 after the keys."""
    call = call_of(*arguments)
    with on_device_of(call.v):
        end = states_at_block_starts(call.problem(), keep=False)
        return *empty_additions(call), to_common(end.value_end, end.denom_end, call.layout, call.sketch)


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
    d_ends = to_common_backward(d_end, p.layout, call.sketch)
    after = decay_to_the_end(p, batch=call.v.shape[0])  # [B, n, Hkv]
    # dx_n = Λ_{n+1} … dS_N; the last blocks' keys reach no state.
    factor = pad(after[:, 1:], (0, 0, 0, 1))
    factor[:, max(0, factor.shape[1] - p.local_blocks) :] = 0
    d_total = [plus_scaled(d_x, factor, d_x_end) for d_x, d_x_end in zip(d_added, d_ends, strict=True)]
    gradients = block_backward_dv_state(p, *d_total)
    d_mass = d_log_gate = None
    if call.mass is not None and gradients.mass is not None:
        d_mass = gradients.mass.mT.to(call.mass.dtype)
    if call.log_gate is not None:
        through = through_blocks(p, states_at_block_starts(p), after, d_ends)
        d_log_gate = state_gate_gradient(gradients.dgate_state, through, p.blocks, p.past, call.v.shape[1]).to(
            call.log_gate.dtype
        )
    return gradients.v, trimmed_rows(gradients.b, call.sketch), gradients.state_v, d_mass, d_log_gate


def decay_to_the_end(problem: Problem, batch: int) -> Tensor:
    """Return what of the state at each block's start is left at the last block's, [B, n, Hkv] fp32."""
    p = problem
    if p.log_decay is None:
        return torch.ones(batch, p.blocks.count // batch, p.v.shape[2], device=p.v.device)
    log_decay = p.log_decay.double().unflatten(0, (batch, -1))
    log_decay[:, -1] = 0
    return log_decay.flip(1).cumsum(1).flip(1).exp().float()


def plus_scaled(x: Tensor, factor: Tensor, x_end: Tensor) -> Tensor:
    """Return x [N, Hkv, ·] + factor [B, n, Hkv] · x_end [B, Hkv, ·]."""
    blocks = x.unflatten(0, factor.shape[:2])
    factor = factor.view(*factor.shape, *[1] * (x.ndim - 2))
    return torch.addcmul(blocks, factor.to(x.dtype), x_end[:, None].to(x.dtype)).flatten(0, 1)


def through_blocks(problem: Problem, met: States, after: Tensor, d_ends: tuple[Tensor, Tensor]) -> Tensor:
    """Return of each block the product of what of the state goes through it and its gradient, [N, Hkv] fp32: S_n, or of
    two local blocks S_{n+1}; of a sequence's last block, its own state."""
    p, sums = problem, torch.zeros_like(after)
    for x, d_x_end, weight in zip((met.value, met.denom), d_ends, p.layout.weights(p.v.device), strict=True):
        weight = weight.view(-1, *[1] * (x.ndim - 3))
        states = torch.where(weight == 0, 0.0, x.float())  # what no query reads is not set
        d_states = d_x_end / torch.where(weight == 0, 1.0, weight)
        sums += torch.einsum("bnhf,bhf->bnh", states.unflatten(0, after.shape[:2]).flatten(3), d_states.flatten(2))
    sums *= after
    if p.local_blocks == 2:
        sums = torch.cat((sums[:, 1:], sums[:, -1:]), dim=1)
    return sums.flatten(0, 1)


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
