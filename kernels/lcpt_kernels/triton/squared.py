"""Squared attention in Triton: the steps of `chunked.py`, each a kernel that works on all blocks at once.

    forward   squared_state → scan → squared_output
              what a block adds to the state; the state that it meets; local keys and the state under one normaliser
    backward  normaliser → squared_state → scan → squared_backward_query
              δ = −do·o; states once more: kept, they would be the largest tensors of a layer; dq, da
              → squared_state → scan_backward → squared_backward_value, squared_backward_key
              of queries what it was of keys: the gradient of the state; dv, db; dk
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpt_kernels.chunked import Plan
from lcpt_kernels.triton.blocks import dense, packed
from lcpt_kernels.triton.gates import gradient_of_gate
from lcpt_kernels.triton.layout import GROUP, Layout, from_common, to_common
from lcpt_kernels.triton.normaliser import normaliser_backward
from lcpt_kernels.triton.problem import Problem
from lcpt_kernels.triton.scan import scan, scan_backward
from lcpt_kernels.triton.squared_backward_key import squared_backward_key
from lcpt_kernels.triton.squared_backward_query import squared_backward_query
from lcpt_kernels.triton.squared_backward_value import squared_backward_value
from lcpt_kernels.triton.squared_output import squared_output
from lcpt_kernels.triton.squared_state import squared_state


def compute(
    plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], initial: Tensor | None, final: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q [B, T, H, D] and a [B, T, H, r] against the keys "k" [B, P + T, Hkv, D], "v" [B, P + T, Hkv, Dv] and
    "b" [B, P + T, Hkv, r], and "log_gate" [B, P + T, Hkv] ≤ 0 if it is there: the first P, which begin a block, are of
    tokens before the queries. Without "k", q is a and k is b. initial [B, Hkv, F, Dv + 1] fp32: the state of what came
    before, as in `chunked.py`; cu_seqlens [N + 1] for B = 1. fp32, bf16 or fp16; products accumulate in fp32.

    -> (o [B, T, H, Dv] in q's dtype, with `final` the state [B, Hkv, F, Dv + 1] for the token after the last).
    """
    v, b = keys["v"], keys["b"]
    size, f = a.shape[3], plan.features
    layout = Layout(-(-size // GROUP) * GROUP, (f.c0, f.c1, f.c2))
    a, b = with_rows_of(a, layout.size), with_rows_of(b, layout.size)
    q, k = (with_rows(q), with_rows(keys["k"])) if "k" in keys else (a, b)
    if cu_seqlens is None:
        blocks = dense(*v.shape[:2], plan.block_size, v.device, final)
    else:
        blocks = packed(cu_seqlens.to(v.device), v.shape[1], plan.block_size)
    state = (None, None) if initial is None else from_common(initial.float(), layout, size)
    with torch.cuda.device(v.device) if v.is_cuda else nullcontext():
        o, *end = _Squared.apply(q, k, with_rows(v), a, b, keys.get("log_gate"), *state, blocks, plan, layout, final)
    return o, to_common(*end, layout, size) if final else None


def with_rows(x: Tensor) -> Tensor:
    """x with numbers of one row side by side; other strides are free."""
    return x if x.stride(3) == 1 else x.contiguous()


def with_rows_of(x: Tensor, size: int) -> Tensor:
    """The same with zeros up to `size`: products of whole groups."""
    return with_rows(x if x.shape[3] == size else pad(x, (0, size - x.shape[3])))


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, b, log_gate, values_before, norms_before, blocks, plan, layout, final):
        problem = Problem.of(q, k, v, a, b, log_gate, blocks, plan, layout, values_before is not None, final)
        values, norms, *end = states_met(problem, values_before, norms_before)
        o, z = squared_output(problem, values, norms)
        ctx.save_for_backward(q, k, v, a, b, log_gate, values_before, norms_before, o, z)
        ctx.options = blocks, plan, layout, final
        return o, *end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, d_values_end=None, d_norms_end=None):
        q, k, v, a, b, log_gate, values_before, norms_before, o, z = ctx.saved_tensors
        blocks, plan, layout, final = ctx.options
        problem = Problem.of(q, k, v, a, b, log_gate, blocks, plan, layout, values_before is not None, final)
        do = with_rows(do)
        delta = normaliser_backward(do, o)

        values, norms, *_ = states_met(problem, values_before, norms_before)
        dq, da, near, far = squared_backward_query(problem, values, norms, do, delta, z)
        if log_gate is None:
            values = norms = None  # the gradients of states take their memory

        d_values, d_norms = squared_state(
            a, do, problem.since, blocks, layout, problem.type, heads=v.shape[2], past=problem.past, delta=delta,
            norm=z)
        if final:
            d_norms_end = symmetric(d_norms_end, layout)
        weights, of_norms = layout.weights(q.device)
        back = dict(log_decay=problem.log_decay, blocks=blocks, local_blocks=plan.local_blocks,
                    keep_before=problem.continued)
        d_values_before, through = scan_backward(d_values, weights, d_end=d_values_end, met=values, **back)
        d_norms_before, through_norms = scan_backward(d_norms, of_norms, d_end=d_norms_end, met=norms, **back)

        dv, db, far_keys = squared_backward_value(problem, d_values, d_norms, do, z)
        dk, near_keys = squared_backward_key(problem, do, delta, z)
        if not problem.exact:  # k is b: one gradient
            dk, db = None, (dk + db).to(b.dtype)

        d_log_gate = None
        if log_gate is not None:
            near, far = (pad(x.unflatten(2, (v.shape[2], -1)).sum(3), (0, 0, problem.past, 0)) for x in (near, far))
            d_log_gate = gradient_of_gate(
                near - near_keys, far, far_keys, through + through_norms, blocks, problem.past).to(log_gate.dtype)
        return dq, dk, dv, da, db, d_log_gate, d_values_before, d_norms_before, None, None, None, None


def states_met(problem: Problem, values_before: Tensor | None, norms_before: Tensor | None) -> tuple[Tensor, ...]:
    """-> the state that every block meets: values [N, Hkv, F, Dv] and norms [N, Hkv, M], weighed for queries; and, if
    asked for, those of the last block as fp32 sums [B, Hkv, F, Dv] and [B, Hkv, M]."""
    p = problem
    values, norms = squared_state(p.b, p.v, p.until, p.blocks, p.layout, p.type, heads=p.v.shape[2])
    weights, of_norms = p.layout.weights(p.v.device)
    options = dict(log_decay=p.log_decay, blocks=p.blocks, local_blocks=p.plan.local_blocks, keep_end=p.ended)
    values_end = scan(values, weights, before=values_before, **options)
    norms_end = scan(norms, of_norms, before=norms_before, **options)
    return (values, norms, values_end, norms_end) if p.ended else (values, norms)


def symmetric(d_norms: Tensor, layout: Layout) -> Tensor:
    """The gradient of a Gram matrix, which is symmetric, as a symmetric one: kernels take 2 dG b for (dG + dGᵀ) b."""
    gram, rest = d_norms[..., : layout.size**2], d_norms[..., layout.size**2 :]
    gram = gram.unflatten(-1, (layout.size, layout.size))
    return torch.cat((((gram + gram.mT) / 2).flatten(-2), rest), dim=-1)
