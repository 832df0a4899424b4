"""Squared, feature and FLuRKA attention in Triton: the steps of `chunked.py`, each a kernel on all blocks at once.

    forward   block_state → block_forward
              the state at each block's start; local keys and state in one output
              with an exchange, the backward pass of `state_autograd.py` has db and dv
    backward  backward_delta → block_state → block_backward_dq
              δ = −do·o and 1 / l; the states again, since kept they would be a layer's largest tensors; dq, da
              → block_state → block_backward_dv → block_backward_dk
              the same kernel on queries gives the gradient of what each block adds to the state; dv, db; dk
              where q is a and k is b, the sum of both gradients; query_feature_gradient for given features

Both are operators of PyTorch, which torch.compile does not look into. Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpt_kernels.derivatives import no_second_derivative
from lcpt_kernels.symmetric_features import QuadraticFeatures
from lcpt_kernels.triton.block_causal.backward_dk import block_backward_dk
from lcpt_kernels.triton.block_causal.backward_dq import block_backward_dq
from lcpt_kernels.triton.block_causal.backward_dv import block_backward_dv, block_backward_dv_local
from lcpt_kernels.triton.block_causal.block_table import Blocks, dense, packed
from lcpt_kernels.triton.block_causal.delta import backward_delta
from lcpt_kernels.triton.block_causal.feature_gradient import query_feature_gradient
from lcpt_kernels.triton.block_causal.forward import block_forward
from lcpt_kernels.triton.block_causal.gate import gate_gradient
from lcpt_kernels.triton.block_causal.local_weights import ROW_MAX_FLOOR, LocalWeight
from lcpt_kernels.triton.block_causal.problem import Problem, build_problem
from lcpt_kernels.triton.block_causal.state import state_gradients, states_at_block_starts
from lcpt_kernels.triton.block_causal.state_layout import (
    GROUP,
    Layout,
    from_common,
    from_common_backward,
    to_common,
    to_common_backward,
    with_symmetric_pairs,
)
from lcpt_kernels.triton.common.tensors import (
    on_device_of,
    trimmed_rows,
    with_contiguous_rows,
    with_padded_rows,
)

NAME = "block-causal attention"  # in errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of both operators, in their order. The features are those of c₀ + c₁ (a·b) + c₂ (a·b)²: given
    features have the coefficients (0, 1, 0)."""

    q: Tensor | None  # None: q is a and k is b
    k: Tensor | None
    v: Tensor
    a: Tensor
    b: Tensor
    state_v: Tensor | None  # of summaries; None: v
    mass: Tensor | None
    log_gate: Tensor | None
    initial: Tensor | None
    # [N, Hkv, F, Dv] and [N, Hkv, M] of `state_pass`: never read, they carry the gradient of what blocks add.
    value_added: Tensor | None
    denom_added: Tensor | None
    cu_seqlens: Tensor | None
    summaries: int  # summaries of a block; 0: tokens are added to the state
    local_weight: int  # a LocalWeight
    degree: int  # of LocalWeight.POWER
    coefficients: list[float]
    scale: float
    shift: float  # of LocalWeight.POWER
    offset: float
    block_size: int
    local_blocks: int
    final: bool  # whether to return the final state
    two_passes: bool  # whether `state_pass` takes the gradient of what blocks add to the state

    @property
    def sketch(self) -> int:
        return self.a.shape[3]

    @property
    def layout(self) -> Layout:
        c0, c1, c2 = self.coefficients
        return Layout(-(-self.sketch // GROUP) * GROUP, (c0, c1, c2))

    def blocks(self) -> Blocks:
        batch, tokens = self.v.shape[:2]
        if self.cu_seqlens is None:
            return dense(batch, tokens, self.block_size, self.v.device, self.final or self.two_passes)
        return packed(self.cu_seqlens.to(self.v.device), tokens, self.block_size)

    def problem(self) -> Problem:
        a, b = (with_padded_rows(x, self.layout.size) for x in (self.a, self.b))
        v = with_contiguous_rows(self.v)
        return build_problem(
            q=a if self.q is None else with_contiguous_rows(self.q),
            k=b if self.k is None else with_contiguous_rows(self.k),
            v=v,
            a=a,
            b=b,
            state_v=v if self.state_v is None else with_contiguous_rows(self.state_v),
            mass=None if self.mass is None else self.mass.float().mT.contiguous(),
            log_gate=self.log_gate,
            blocks=self.blocks(),
            layout=self.layout,
            summaries=self.summaries,
            local_weight=LocalWeight(self.local_weight),
            degree=self.degree,
            scale=self.scale,
            shift=self.shift,
            offset=self.offset,
            local_blocks=self.local_blocks,
            has_initial_state=self.initial is not None,
            keep_final_state=self.final,
        )

    def empty_end(self) -> Tensor:
        """Return a tensor like the final state."""
        batch, _, heads, width = self.v.shape
        dimension = QuadraticFeatures(self.sketch, self.layout.coefficients).dimension
        return self.v.new_empty(batch, heads, dimension, width + 1, dtype=torch.float32)

    def initial_states(self) -> tuple[Tensor | None, Tensor | None]:
        """Return value_state and denom_state before the first block, [B, Hkv, ·]."""
        if self.initial is None:
            return None, None
        return from_common(self.initial.float(), self.layout, self.sketch)


SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "list[float]": "float[]",
}
FIELDS = [field.name for field in fields(Call)]
TENSOR_FIELDS = [field.name for field in fields(Call) if "Tensor" in str(field.type)]  # the first of FIELDS
ADDED = ("value_added", "denom_added")
ARGUMENTS = ", ".join(f"{SCHEMA_TYPES[str(field.type)]} {field.name}" for field in fields(Call))


def flatten(call: Call) -> list[Any]:
    """Return the arguments of the operators, in the order of the fields of Call."""
    return [getattr(call, name) for name in FIELDS]


def unflatten(arguments: tuple[Any, ...]) -> Call:
    """Return the Call of the operators' arguments: the inverse of flatten."""
    return Call(**dict(zip(FIELDS, arguments, strict=True)))


@torch.library.custom_op(
    "lcpt_kernels::block_causal_attention",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor o, Tensor denominator, Tensor row_max, Tensor end)",
)
def forward(*arguments):
    """Return o, denominator, row_max and the final state, empty where there is none; see `block_forward`."""
    call = unflatten(arguments)
    with on_device_of(call.v):
        problem = call.problem()
        met = states_at_block_starts(problem, call.initial_states())
        o, denominator, row_max = block_forward(problem, met.value, met.denom)
        end = None
        if call.final:
            end = to_common(met.value_end, met.denom_end, call.layout, call.sketch)
        return o, denominator, *(denominator.new_empty(0) if x is None else x for x in (row_max, end))


@forward.register_fake
def _(*arguments):
    call = unflatten(arguments)
    batch, tokens, heads, _ = call.a.shape
    o = call.a.new_empty(batch, tokens, heads, call.v.shape[3])
    denominator = o.new_empty(batch, heads, tokens, dtype=torch.float32)
    row_max = denominator.shape if call.local_weight == LocalWeight.EXPONENTIAL else (0,)
    end = call.empty_end() if call.final else denominator.new_empty(0)
    return o, denominator, denominator.new_empty(row_max), end


@torch.library.custom_op(
    "lcpt_kernels::block_causal_attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor? d_end, Tensor o, Tensor denominator, Tensor? row_max, {ARGUMENTS}) -> Tensor[]",
)
def backward(do, d_end, o, denominator, row_max, *arguments):
    """Return the gradients of all tensors but cu_seqlens in the order of Call, empty where there is none. States are
    computed again: kept, they would be a layer's largest tensor."""
    call = unflatten(arguments)
    with on_device_of(call.v):
        gradients = _backward(call, call.problem(), with_contiguous_rows(do), d_end, o, denominator, row_max)
    return [denominator.new_empty(0) if x is None else x for x in gradients]


def _backward(
    call: Call,
    problem: Problem,
    do: Tensor,
    d_end: Tensor | None,
    o: Tensor,
    denominator: Tensor,
    row_max: Tensor | None,
) -> tuple[Tensor | None, ...]:
    p, blocks, layout = problem, problem.blocks, problem.layout
    delta, reciprocal = backward_delta(do, o, denominator)

    value_before, denom_before = call.initial_states()
    if value_before is not None:  # `block_backward_dq` multiplies by one of x_p x_q and x_q x_p
        value_before = with_symmetric_pairs(value_before, layout)
    states = states_at_block_starts(p, (value_before, denom_before))
    d_q: Tensor | None
    d_q, da, dgate_local, dgate_state = block_backward_dq(p, states.value, states.denom, do, delta, reciprocal, row_max)
    # Memory is scarcest from here on: what is read no more goes, and what is fp32 only to be summed shrinks at once.
    met = None if p.log_decay is None else states
    del states
    if call.q is None:  # q is a: one gradient
        given_features = layout.coefficients == (0, 1, 0)
        da = (
            query_feature_gradient(p.a, d_q, da, delta, denominator, call.offset)
            if given_features
            else da.add_(d_q).to(call.a.dtype)
        )
        d_q = None

    d_met = state_gradients(
        p,
        do,
        delta,
        reciprocal if row_max is None else reciprocal * row_max.clamp(min=ROW_MAX_FLOOR.value).neg().exp2(),
        (None, None) if d_end is None else to_common_backward(d_end, layout, call.sketch),
        met,
    )
    d_value_added: Tensor | None
    d_denom_added: Tensor | None
    d_value_added, d_denom_added, through = d_met.value, d_met.denom, d_met.through
    d_before = d_met.value_end, d_met.denom_end
    del d_met

    d_v: Tensor | None
    db = d_state_v = d_mass = dgate_through = None
    if call.two_passes:
        d_v = block_backward_dv_local(p, do, reciprocal, row_max)
    else:
        through_state = block_backward_dv(p, d_value_added, d_denom_added, do, reciprocal, row_max)
        d_v, db, d_state_v = through_state.v, through_state.b, through_state.state_v
        d_mass, dgate_through = through_state.mass, through_state.dgate_state
        d_value_added = d_denom_added = None
    d_k: Tensor | None
    d_k, dgate_keys = block_backward_dk(p, do, delta, reciprocal, row_max)
    if call.k is None:  # k is b
        db = (d_k if db is None else db.add_(d_k)).to(call.b.dtype)
        d_k = None

    d_log_gate = d_initial = None
    if call.log_gate is not None:
        assert dgate_local is not None and dgate_state is not None and dgate_keys is not None
        assert through is not None
        local, state_queries = (
            pad(x.unflatten(1, (p.v.shape[2], -1)).sum(2), (p.past, 0)) for x in (dgate_local, dgate_state)
        )
        d_log_gate = gate_gradient(local - dgate_keys, state_queries, dgate_through, through, blocks, p.past)
        d_log_gate = d_log_gate.to(call.log_gate.dtype)
    if call.initial is not None:
        d_initial = from_common_backward(*d_before, layout, call.sketch).to(call.initial.dtype)
    if call.mass is not None and d_mass is not None:
        d_mass = d_mass.mT.to(call.mass.dtype)
    da, db = trimmed_rows(da, call.sketch), None if db is None else trimmed_rows(db, call.sketch)
    return d_q, d_k, d_v, da, db, d_state_v, d_mass, d_log_gate, d_initial, d_value_added, d_denom_added


@backward.register_fake
def _(do, d_end, o, denominator, row_max, *arguments):
    call = unflatten(arguments)
    shapes = dict(zip(TENSOR_FIELDS[:-1], arguments, strict=False))
    if call.two_passes:
        shapes |= zip(ADDED, empty_additions(call), strict=True)
    return [
        shapes[name].new_empty(shapes[name].shape) if some else denominator.new_empty(0)
        for name, some in have_gradient(call).items()
    ]


def have_gradient(call: Call) -> dict[str, bool]:
    """Return for all tensors but cu_seqlens, by name, whether the backward pass has their gradient."""
    have = {name: getattr(call, name) is not None for name in TENSOR_FIELDS[:-1]}
    if call.two_passes:  # those through the state are in the backward pass of `state_pass`
        have |= dict(b=call.k is None, state_v=False, mass=False) | dict.fromkeys(ADDED, True)
    return have


def empty_additions(call: Call) -> tuple[Tensor, Tensor]:
    """Return what stands for the blocks' additions to the state, and has their gradient: value_added [N, Hkv, F, Dv]
    and denom_added [N, Hkv, M], for calls without cu_seqlens; without memory."""
    batch, tokens, heads, width = call.v.shape
    blocks, layout = batch * (tokens // call.block_size + 1), call.layout
    low = layout.pairs and call.v.dtype != torch.float32
    value_added = call.v.new_zeros((), dtype=torch.bfloat16 if low else torch.float32)
    denom_added = call.v.new_zeros((), dtype=torch.float32)
    return (
        value_added.expand(blocks, heads, layout.features, width),
        denom_added.expand(blocks, heads, layout.denom_elements),
    )


def save(ctx, inputs, output):
    o, denominator, row_max, _ = output
    tensors = [None if name in ADDED else x for name, x in zip(TENSOR_FIELDS, inputs, strict=False)]
    ctx.save_for_backward(o, denominator, row_max, *tensors)
    ctx.constants = inputs[len(TENSOR_FIELDS) :]


def differentiate(ctx, do, d_denominator, d_row_max, d_end):
    o, denominator, row_max, *tensors = ctx.saved_tensors
    call = unflatten((*tensors, *ctx.constants))
    gradients = torch.ops.lcpt_kernels.block_causal_attention_backward(
        do, d_end if call.final else None, o, denominator, row_max if row_max.numel() else None, *flatten(call)
    )
    found = [dx if some else None for dx, some in zip(gradients, have_gradient(call).values(), strict=True)]
    return *found, *(None for _ in FIELDS[len(found) :])


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "reference"))
