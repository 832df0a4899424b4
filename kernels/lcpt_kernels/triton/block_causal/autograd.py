"""Squared, feature and FLuRKA attention in Triton: the steps of `chunked.py`, each a kernel on all blocks at once.

    forward   block_state → scan → block_forward
              what a block adds to the state; the state that it meets; local keys and the state under one normaliser
    backward  normaliser → block_state → scan → block_backward_dq
              δ = −do·o; states once more: kept, they would be the largest tensors of a layer; dq, da
              → block_state → scan_backward → block_backward_dv, block_backward_dk
              of queries what it was of keys: the gradient of the state; dv, db; dk
              where a is q and b is k, the sum of both gradients; linear_gradient makes that of queries with features

Both are operators of PyTorch, which torch.compile takes as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpt_kernels.chunked import Exponential, Linear, Plan
from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.symmetric_features import QuadraticFeatures
from lcpt_kernels.triton.block_causal.backward_dk import block_backward_dk
from lcpt_kernels.triton.block_causal.backward_dq import block_backward_dq
from lcpt_kernels.triton.block_causal.backward_dv import block_backward_dv
from lcpt_kernels.triton.block_causal.block_table import Blocks, dense, packed
from lcpt_kernels.triton.block_causal.feature_gradient import linear_gradient
from lcpt_kernels.triton.block_causal.forward import block_forward
from lcpt_kernels.triton.block_causal.gate import gradient_of_gate
from lcpt_kernels.triton.block_causal.local_weights import EXPONENTIAL, FAINTEST
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.block_causal.scan import scan, scan_backward
from lcpt_kernels.triton.block_causal.state import block_state
from lcpt_kernels.triton.block_causal.state_layout import (
    GROUP,
    Layout,
    from_common,
    from_common_backward,
    to_common,
    to_common_backward,
)
from lcpt_kernels.triton.common.delta import backward_delta
from lcpt_kernels.triton.common.tensors import of_size, on_device_of, with_rows, with_rows_of

NAME = "block-causal attention"  # in errors


def compute(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: dict[str, Tensor],
    initial: Tensor | None,
    final: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q [B, T, H, D] and a [B, T, H, r] against the keys "k" [B, P + T, Hkv, D], "v" [B, P + T, Hkv, Dv] and
    "b" [B, P + T, Hkv, r], and "log_gate" [B, P + T, Hkv] ≤ 0 if it is there: the first P, which begin a block, are of
    tokens before the queries. Without "k", q is a and k is b. With plan.summaries "b", "far_v" [B, S, Hkv, Dv] and, if
    it is there, "mass" [B, S, Hkv] are of the summaries of whole blocks. initial [B, Hkv, F, Dv + 1] fp32: the state of
    what came before, as in `chunked.py`; cu_seqlens [N + 1] for B = 1. fp32, bf16 or fp16; products accumulate in fp32,
    and those of weights and features are of bf16 for both: fp16, whose range is too short for them, is no more exact.

    -> (o [B, T, H, Dv] in q's dtype, with `final` the state [B, Hkv, F, Dv + 1] for the token after the last).
    """
    refuse_transforms(NAME, "reference")
    k, f = keys.get("k"), plan.features
    o, *_, end = torch.ops.lcpt_kernels.block_causal_attention(
        None if k is None else q,
        k,
        keys["v"],
        a,
        keys["b"],
        keys.get("far_v"),
        keys.get("mass"),
        keys.get("log_gate"),
        initial,
        cu_seqlens,
        plan.summaries or 0,
        degree_of(plan, k),
        [f.c0, f.c1, f.c2],
        plan.scale,
        plan.offset,
        plan.block_size,
        plan.local_blocks,
        final,
    )
    return o, end if final else None


def degree_of(plan: Plan, k: Tensor | None) -> int:
    """The local weight as a number: see `local.py`."""
    if k is None:  # the same as that of the state
        return 0
    return {Exponential: EXPONENTIAL.value, Linear: 1}.get(type(plan.local)) or plan.local.degree


class Call(NamedTuple):
    """The arguments of both operators, as `compute` says; degree 0: local weights are those of the state. Features are
    those of a polynomial c₀ + c₁ s + c₂ s² of s = a·b: with (0, 1, 0) a and b themselves."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    a: Tensor
    b: Tensor
    far_v: Tensor | None
    mass: Tensor | None
    log_gate: Tensor | None
    initial: Tensor | None
    cu_seqlens: Tensor | None
    summaries: int
    degree: int
    coefficients: list[float]
    scale: float
    offset: float
    block_size: int
    local_blocks: int
    final: bool

    @property
    def sketch(self) -> int:
        return self.a.shape[3]

    @property
    def layout(self) -> Layout:
        return Layout(-(-self.sketch // GROUP) * GROUP, tuple(self.coefficients))

    def blocks(self) -> Blocks:
        batch, tokens = self.v.shape[:2]
        if self.cu_seqlens is None:
            return dense(batch, tokens, self.block_size, self.v.device, self.final)
        return packed(self.cu_seqlens.to(self.v.device), tokens, self.block_size)

    def problem(self) -> Problem:
        a, b = (with_rows_of(x, self.layout.size) for x in (self.a, self.b))
        q, k = (a, b) if self.q is None else (with_rows(self.q), with_rows(self.k))
        v = with_rows(self.v)
        far_v = v if self.far_v is None else with_rows(self.far_v)
        mass = None if self.mass is None else self.mass.float().contiguous()
        return Problem.of(
            q,
            k,
            v,
            a,
            b,
            far_v,
            mass,
            self.log_gate,
            self.blocks(),
            self.layout,
            self.summaries,
            self.degree,
            self.scale,
            self.offset,
            self.local_blocks,
            self.initial is not None,
            self.final,
        )

    def state_before(self) -> tuple[Tensor | None, Tensor | None]:
        if self.initial is None:
            return None, None
        return from_common(self.initial.float(), self.layout, self.sketch)


ARGUMENTS = """Tensor? q, Tensor? k, Tensor v, Tensor a, Tensor b, Tensor? far_v, Tensor? mass, Tensor? log_gate,
    Tensor? initial, Tensor? cu_seqlens, int summaries, int degree, float[] coefficients, float scale, float offset,
    int block_size, int local_blocks, bool final"""
TENSORS = 10  # of these


@torch.library.custom_op(
    "lcpt_kernels::block_causal_attention",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor o, Tensor z, Tensor peak, Tensor end)",
)
def forward(*arguments):
    """-> o; z and peak [B, T, H] fp32, as `block_forward` says; end; empty for what there is not."""
    call = Call(*arguments)
    with on_device_of(call.v):
        problem = call.problem()
        values, norms, *end = states_met(problem, *call.state_before())
        o, z, peak = block_forward(problem, values, norms)
        end = to_common(*end, call.layout, call.sketch) if end else None
        return o, z, *(z.new_empty(0) if x is None else x for x in (peak, end))


@forward.register_fake
def _(*arguments):
    call = Call(*arguments)
    batch, tokens, heads, _ = call.a.shape
    key_heads, width = call.v.shape[2:]
    o = call.a.new_empty(batch, tokens, heads, width)
    z = o.new_empty(batch, tokens, heads, dtype=torch.float32)
    peak = z.shape if call.degree == EXPONENTIAL.value else (0,)
    dimension = QuadraticFeatures(call.sketch, tuple(call.coefficients)).dimension
    end = (batch, key_heads, dimension, width + 1) if call.final else (0,)
    return o, z, z.new_empty(peak), z.new_empty(end)


@torch.library.custom_op(
    "lcpt_kernels::block_causal_attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor? d_end, Tensor o, Tensor z, Tensor? peak, {ARGUMENTS}) -> Tensor[]",
)
def backward(do, d_end, o, z, peak, *arguments):
    """-> the gradients of q, k, v, a, b, far_v, mass, log_gate and initial; empty for what is not there."""
    call = Call(*arguments)
    with on_device_of(call.v):
        gradients = _backward(call, call.problem(), with_rows(do), d_end, o, z, peak)
    return [z.new_empty(0) if x is None else x for x in gradients]


def _backward(
    call: Call, problem: Problem, do: Tensor, d_end: Tensor | None, o: Tensor, z: Tensor, peak: Tensor | None
):
    p, blocks, layout = problem, problem.blocks, problem.layout
    delta = backward_delta(do, o)

    values, norms, *_ = states_met(p, *call.state_before())
    dq, da, near, far = block_backward_dq(p, values, norms, do, delta, z, peak)
    if p.log_decay is None:
        values = norms = None  # the gradients of states take their memory

    since = None if p.since is None else p.since.sum(-1)
    d_values, d_norms = block_state(
        p.a,
        do,
        since,
        blocks,
        layout,
        p.type_of_state,
        heads=p.v.shape[2],
        past=p.past,
        delta=delta,
        norm=z if peak is None else z * peak.clamp(min=FAINTEST.value).exp(),
    )
    d_values_end, d_norms_end = (None, None) if d_end is None else to_common_backward(d_end, layout, call.sketch)
    weights, of_norms = layout.weights(do.device)
    back = dict(log_decay=p.log_decay, blocks=blocks, local_blocks=call.local_blocks, keep_before=p.continued)
    d_values_before, through = scan_backward(d_values, weights, d_end=d_values_end, met=values, **back)
    d_norms_before, through_norms = scan_backward(d_norms, of_norms, d_end=d_norms_end, met=norms, **back)

    of_keys = block_backward_dv(p, d_values, d_norms, do, z, peak)
    dk, near_keys = block_backward_dk(p, do, delta, z, peak)
    db = of_keys.b
    if call.q is None:  # q is a, and k is b: one gradient
        linear = layout.coefficients == (0, 1, 0)
        da = linear_gradient(p.a, dq, da, delta, z, call.offset) if linear else (dq + da).to(call.a.dtype)
        dq, dk, db = None, None, (dk + db).to(call.b.dtype)

    d_log_gate = d_initial = None
    if p.log_decay is not None:
        near, far = (pad(x.unflatten(2, (p.v.shape[2], -1)).sum(3), (0, 0, p.past, 0)) for x in (near, far))
        d_log_gate = gradient_of_gate(near - near_keys, far, of_keys.far, through + through_norms, blocks, p.past).to(
            call.log_gate.dtype
        )
    if p.continued:
        d_initial = from_common_backward(d_values_before, d_norms_before, layout, call.sketch).to(call.initial.dtype)
    d_mass = None if of_keys.mass is None else of_keys.mass.to(call.mass.dtype)
    da, db = of_size(da, call.sketch), of_size(db, call.sketch)
    return dq, dk, of_keys.v, da, db, of_keys.far_v, d_mass, d_log_gate, d_initial


@backward.register_fake
def _(do, d_end, o, z, peak, *arguments):
    return [z.new_empty(0) if x is None else x.new_empty(x.shape) for x in arguments[: TENSORS - 1]]


def save(ctx, inputs, output):
    o, z, peak, _ = output
    ctx.save_for_backward(o, z, peak, *inputs[:TENSORS])
    ctx.numbers = inputs[TENSORS:]


def differentiate(ctx, do, d_z, d_peak, d_end):
    o, z, peak, *tensors = ctx.saved_tensors
    call = Call(*tensors, *ctx.numbers)
    gradients = torch.ops.lcpt_kernels.block_causal_attention_backward(
        do, d_end if call.final else None, o, z, peak if peak.numel() else None, *call
    )
    given = [None if x is None else dx for x, dx in zip(tensors[:-1], gradients, strict=True)]
    return *given, *(None for _ in call[TENSORS - 1 :])


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "reference"))


def states_met(problem: Problem, values_before: Tensor | None, norms_before: Tensor | None) -> tuple[Tensor, ...]:
    """-> the state that every block meets: values [N, Hkv, F, Dv] and norms [N, Hkv, M], weighed for queries; and, if
    asked for, those of the last block as fp32 sums [B, Hkv, F, Dv] and [B, Hkv, M]."""
    p = problem
    values, norms = block_state(
        p.b, p.far_v, p.until, p.far_blocks, p.layout, p.type_of_state, heads=p.v.shape[2], mass=p.mass
    )
    weights, of_norms = p.layout.weights(p.v.device)
    options = dict(log_decay=p.log_decay, blocks=p.blocks, local_blocks=p.local_blocks, keep_end=p.ended)
    values_end = scan(values, weights, before=values_before, **options)
    norms_end = scan(norms, of_norms, before=norms_before, **options)
    return (values, norms, values_end, norms_end) if p.ended else (values, norms)
