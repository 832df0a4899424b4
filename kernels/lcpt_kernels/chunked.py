"""Block-causal attention in PyTorch: a loop over blocks with a running state, and its derivative by hand.

Autograd would keep features and scores of every block; here the backward pass recomputes them, so memory is that of
the inputs, the output and one state. All arithmetic is fp32 (float64 for float64 inputs), one block at a time.
A column of ones behind v, v̄ = [v, 1], makes the denominator a part of every product. With G the running sum of the log
gate and B the last token before the block of t:

    [N_t, l_t] = [0, offset] + Σ_{s local} e^{G_t − G_s} w(scale·q_t·k_s) v̄_s + e^{G_t − G_B} φ(a_t)ᵀ S
    S = Σ_{s earlier} e^{G_B − G_s} φ(b_s) v̄_sᵀ          o = N / l
    n̄ = [do, -(do·o)] / l      dW_ts = n̄_t·v̄_s, the gradient of every weight, local or through S

No exponent is positive. A weight W_ts depends on G_t − G_s, so dG_t = Σ_s dW_ts W_ts − Σ_t' dW_t't W_t't. With w = exp
a row is over e^{m_i} as in FlashAttention-2 (arXiv 2307.08691). In code: acc = [N, l] of some rows, m_i their maximum,
l_i their denominator; `denominator` and `row_max` keep l and m of all rows for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.accumulation import accumulated, accumulator, columns_of, rows_of, with_ones
from lcpt_kernels.constants import ROW_MAX_FLOOR
from lcpt_kernels.decay import Decay
from lcpt_kernels.derivatives import first_derivative_only, refuse_transforms
from lcpt_kernels.local_weights import Exponential
from lcpt_kernels.plan import Block, Plan
from lcpt_kernels.state_input import StateInput, StateInputGradient


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    state_input: StateInput,
    plan: Plan,
    log_gate: Tensor | None = None,
    initial: Tensor | None = None,
    final: bool = False,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return o [B, T, H, Dv] in q's dtype, and with `final` the state [B, H, F, Dv + 1] after the last token.

    Args:
        q: [B, T, H, D], of the last T of the keys' P + T tokens.
        k: [B, P + T, H, D], v: [B, P + T, H, Dv]; the first P tokens start a block.
        a: [B, T, H, r]; None: there is no state.
        state_input: b, v and mass with heads third, [B, ·, H, ·], of the P + T tokens or of their whole blocks'
            summaries.
        log_gate: [B, P + T, H], ≤ 0.
        initial: [B, H, F, Dv + 1], the state before the keys.
        added: what blocks add to the state, from `state_pass`, which then has their gradient; None: computed here.
    """
    refuse_transforms("block-causal attention", "reference")
    state_v = None if state_input.v is v else state_input.v
    tensors = heads_first(q, k, v, a, state_input.b, state_v, state_input.mass, log_gate)
    o, state = _BlockCausal.apply(*tensors, initial, added, plan, final)
    return o.transpose(1, 2), state


def heads_first(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return views [B, H, T, ...] of tensors [B, T, H, ...]."""
    return [x if x is None else x.transpose(1, 2) for x in tensors]


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, b, state_v, mass, log_gate, initial, added, plan, final):
        past, decay, features = k.shape[2] - q.shape[2], Decay(log_gate), plan.features
        state_input = StateInput(b, v if state_v is None else state_v, mass)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        denominator = q.new_empty(*q.shape[:3], 1, dtype=accumulator(v))
        row_max = torch.empty_like(denominator) if isinstance(plan.local, Exponential) else None
        state = _state(plan, v, initial)
        blocks, additions = Block.all(plan, past, k.shape[2], final), iter(() if added is None else added)
        for number, block in enumerate(blocks):
            state = decay.decay_state(blocks[number - 1], state) if number else state
            if block.leaving:
                state += state_input.added(block, plan, decay) if added is None else next(additions)
            rows = _shift_slice(block.rows, past)
            if rows.start == rows.stop:
                continue
            s = plan.scale * rows_of(q, rows) @ rows_of(k, block.local).mT  # [.., c, ≤ ℓc]
            w, m_i = plan.local.weights(s, block.diagonal, decay.tile_log_decay(block))
            acc, state_terms = w @ with_ones(v, block.local), None  # [.., c, Dv + 1]
            if block.leaving or initial is not None:
                state_terms = decay.scale_by_cumsum(
                    block, features.query(columns_of(a, rows)).mT @ state
                )  # state [.., F, Dv + 1]
            acc, l_i, m_new = add_state(acc, m_i, state_terms, plan.offset)
            if m_new is not None:
                row_max[:, :, rows] = m_new
            o[:, :, rows] = acc[..., :-1] / l_i
            denominator[:, :, rows] = l_i
        ctx.save_for_backward(
            q, k, v, a, b, state_v, mass, log_gate, initial, o, denominator, row_max, state if final else None
        )
        ctx.plan = plan
        ctx.added_shape = None if added is None else added.shape  # not kept: they would be a layer's largest tensor
        return o, state if final else None

    @staticmethod
    @first_derivative_only("block-causal attention", "reference")
    def backward(ctx, do, d_final):
        q, k, v, a, b, state_v, mass, log_gate, initial, o, denominator, row_max, final = ctx.saved_tensors
        plan, features, past, decay = ctx.plan, ctx.plan.features, k.shape[2] - q.shape[2], Decay(log_gate)
        state_input = StateInput(b, v if state_v is None else state_v, mass)
        blocks = Block.all(plan, past, k.shape[2], final is not None)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=accumulator(x)) for x in (k, v))  # a block's share comes in parts
        da = a if a is None else torch.zeros_like(a)
        db = d_state_v = d_mass = d_added = None
        if ctx.added_shape is not None:
            d_added = v.new_zeros(ctx.added_shape, dtype=accumulator(v))
        else:
            db, d_state_v, d_mass = (x if x is None else torch.zeros_like(x) for x in (b, state_v, mass))

        def output_gradient(rows):
            do_rows = rows_of(do, rows)
            dz = -(do_rows * o[:, :, rows]).sum(-1, keepdim=True)
            return torch.cat((do_rows, dz), dim=-1) / denominator[:, :, rows]  # n̄ [.., c, Dv + 1]

        def state_output_gradient(block, n):
            """Return n̄ of the state's part alone."""
            n = decay.scale_by_cumsum(block, n)
            return n if row_max is None else _state_alpha(row_max[:, :, _shift_slice(block.rows, past)]) * n

        state = _state(plan, v, initial)
        for number, block in enumerate(blocks):  # forwards, with the state: gradients of the local scores and of a
            state = decay.decay_state(blocks[number - 1], state) if number else state
            if block.leaving:
                state += state_input.added(block, plan, decay)
            rows, local = _shift_slice(block.rows, past), block.local
            if rows.start == rows.stop:
                continue
            n, q_rows, k_local = output_gradient(rows), plan.scale * rows_of(q, rows), rows_of(k, local)
            w, slope = plan.local.weights_and_slopes(
                q_rows @ k_local.mT,
                block.diagonal,
                decay.tile_log_decay(block),
                None if row_max is None else row_max[:, :, rows],
            )
            dw = n @ with_ones(v, local).mT
            decay.add_weight_gradient(block.rows, local, w, dw)
            dv[:, :, local] += w.mT @ n[..., :-1]
            ds = slope.mul_(dw)
            dq[:, :, rows] = plan.scale * (ds @ k_local)
            dk[:, :, local] += ds.mT @ q_rows
            if block.leaving or initial is not None:
                n, a_rows = state_output_gradient(block, n), columns_of(a, rows)
                da[:, :, rows] = features.query_backward(a_rows, state @ n.mT).mT
                decay.add_gradient(block.rows, lambda a=a_rows, n=n, S=state: (features.query(a).mT @ S * n).sum(-1))

        d_state = _state(plan, v, d_final)
        if final is not None:
            decay.add_gradient(blocks[-1].before, lambda: (final * d_final).sum((-2, -1))[..., None])
        # Backwards, with the state's gradient: the gradients of the state's input.
        d_input = StateInputGradient(db, dv if state_v is None else d_state_v, d_mass)
        leaving = sum(block.leaving is not None for block in blocks)
        for number, block in reversed(list(enumerate(blocks))):
            rows = _shift_slice(block.rows, past)
            if block.leaving or initial is not None:
                d_state += features.query(columns_of(a, rows)) @ state_output_gradient(block, output_gradient(rows))
            if block.leaving:
                leaving -= 1
                if d_added is not None:
                    d_added[leaving] = d_state
                else:
                    d_input.add(block, d_state, state_input, plan, decay)
            d_state = decay.decay_state(blocks[number - 1], d_state) if number else d_state
        if initial is not None:
            decay.add_gradient(blocks[0].before, lambda: -(initial * d_state).sum((-2, -1))[..., None])
        d_initial = None if initial is None else d_state
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        return dq, dk, dv, da, db, d_state_v, d_mass, decay.gradient(), d_initial, d_added, None, None


def _state(plan: Plan, v: Tensor, given: Tensor | None) -> Tensor | None:
    """Return S [B, H, F, Dv + 1] or its gradient: a copy of the given one, else zeros."""
    if plan.features is None:
        return None
    if given is not None:
        return accumulated(given).clone()
    return v.new_zeros(*v.shape[:2], plan.features.dimension, v.shape[-1] + 1, dtype=accumulator(v))


def _shift_slice(rows: slice, past: int) -> slice:
    return slice(rows.start - past, rows.stop - past)


def add_state(
    acc: Tensor, m_i: Tensor | None, state_terms: Tensor | None, offset: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add state and offset to acc [.., rows, Dv + 1], the local sums over e^{m_i}, None: 0. Return acc over e^{m_new},
    the denominator of its rows, ∞ where it is 0, and m_new, [.., rows, 1] each."""
    if m_i is None:
        acc, m_new = acc if state_terms is None else acc.add_(state_terms), None
        l_i = acc[..., -1:] + offset
    else:
        acc, m_new = _add_state_to_softmax(acc, m_i, state_terms, offset)
        l_i = acc[..., -1:].clone()
    return acc, l_i.masked_fill_(l_i == 0, torch.inf), m_new  # 0/0 is 0, and so are its gradients


def _add_state_to_softmax(acc: Tensor, m_i: Tensor, state_terms: Tensor | None, offset: float) -> tuple[Tensor, Tensor]:
    if state_terms is None:
        state_terms = torch.zeros_like(acc)
    state_terms[..., -1:] += offset
    state_max = state_terms.abs().amax(-1, keepdim=True)
    m_state = torch.where(state_max > 0, state_max.log().clamp_(ROW_MAX_FLOOR, 0.0), -torch.inf)
    m_new = torch.maximum(m_i, m_state)
    alpha = (m_i - m_new).exp_()
    return acc.mul_(alpha).add_(state_terms.mul_(_state_alpha(m_new))), m_new


def _state_alpha(m: Tensor) -> Tensor:
    """Return e^{−m}, the factor of state and offset. Where m is below ROW_MAX_FLOOR, both are 0."""
    return m.clamp(min=ROW_MAX_FLOOR).neg_().exp_()
