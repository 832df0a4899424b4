"""The state of a sequence without its output, in PyTorch: the first of two passes with an exchange of states between.

    added_n = Σ_{s in the block that leaves at n} e^{G_B − G_s} φ(b_s) v̄_sᵀ        S = Σ_n e^{G_end − G_n} added_n

The output pass, `block_causal_attention`, starts from `added`, so no product is computed twice. Its backward pass
returns the gradient of `added`, to which that of S is added here before the products of b and v. Of the gate, a weight
e^{G_t − G_s} has its part of G_t in the output pass and that of G_s here. Notation: `chunked.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.accumulation import accumulator
from lcpt_kernels.chunked import heads_first
from lcpt_kernels.decay import Decay
from lcpt_kernels.derivatives import first_derivative_only, refuse_transforms
from lcpt_kernels.plan import Block, Plan
from lcpt_kernels.state_input import StateInput, StateInputGradient


def state_pass(
    v: Tensor, state_input: StateInput, plan: Plan, past: int, log_gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what blocks add to the state, [number, B, H, F, Dv + 1], and S [B, H, F, Dv + 1] after the last token.

    The arguments are those of `block_causal_attention`; the first `past` of the keys' tokens have no queries.
    """
    refuse_transforms("block-causal attention", "reference")
    state_v = None if state_input.v is v else state_input.v
    tensors = heads_first(v, state_input.b, state_v, state_input.mass, log_gate)
    added, S = _StatePass.apply(*tensors, plan, past)
    return added, S


class _StatePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, b, state_v, mass, log_gate, plan, past):
        decay, state_input = Decay(log_gate), StateInput(b, v if state_v is None else state_v, mass)
        blocks = Block.all(plan, past, v.shape[2], to_the_end=True)
        size = *v.shape[:2], plan.features.dimension, v.shape[3] + 1
        added = v.new_empty(sum(block.leaving is not None for block in blocks), *size, dtype=accumulator(v))
        S, additions = v.new_zeros(size, dtype=accumulator(v)), iter(added)
        for number, block in enumerate(blocks):
            S = decay.decay_state(blocks[number - 1], S) if number else S
            if block.leaving:
                S += state_input.added(block, plan, decay, out=next(additions))
        ctx.save_for_backward(v, b, state_v, mass, log_gate, S)
        ctx.plan, ctx.past = plan, past
        return added, S

    @staticmethod
    @first_derivative_only("block-causal attention", "reference")
    def backward(ctx, d_added, d_S):
        v, b, state_v, mass, log_gate, S = ctx.saved_tensors
        plan, decay = ctx.plan, Decay(log_gate)
        state_input = StateInput(b, v if state_v is None else state_v, mass)
        blocks, leaving = Block.all(plan, ctx.past, v.shape[2], to_the_end=True), len(d_added)
        d_input = StateInputGradient(
            torch.zeros_like(b),
            torch.zeros_like(state_input.v, dtype=accumulator(v)),
            None if mass is None else torch.zeros_like(mass),
        )
        decay.add_gradient(blocks[-1].before, lambda: (S * d_S).sum((-2, -1))[..., None])
        for number, block in reversed(list(enumerate(blocks))):
            if block.leaving:
                leaving -= 1
                d_input.add(block, d_S + d_added[leaving], state_input, plan, decay)
            d_S = decay.decay_state(blocks[number - 1], d_S) if number else d_S
        d_v = d_input.v.to(v.dtype)
        dv, d_state_v = (d_v, None) if state_v is None else (None, d_v)
        return dv, d_input.b, d_state_v, d_input.mass, decay.gradient(), None, None
