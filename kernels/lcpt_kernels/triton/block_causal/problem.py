"""The record that every kernel of one call takes its arguments from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcpt_kernels.triton.block_causal.block_table import Blocks
from lcpt_kernels.triton.block_causal.gate import block_log_decay, gate_sums_in_blocks
from lcpt_kernels.triton.block_causal.local_weights import LocalWeight
from lcpt_kernels.triton.block_causal.state_layout import Layout
from lcpt_kernels.triton.common.tensors import padded


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Tensors, block tables and sizes of one call. The last stride of every tensor is 1.

    q and a are those of the last T of the keys' past + T tokens. b, state_v and mass are added to the state: those of
    the same tokens, or of S summaries.
    """

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, past + T, Hkv, D]
    v: Tensor  # [B, past + T, Hkv, Dv]
    a: Tensor  # [B, T, H, R]
    b: Tensor  # [B, past + T, Hkv, R], of summaries [B, S, Hkv, R]
    state_v: Tensor  # [B, past + T, Hkv, Dv], of summaries [B, S, Hkv, Dv]
    mass: Tensor | None  # [B, Hkv, past + T] fp32, of summaries [B, Hkv, S]; None: 1
    gate_cumsum: Tensor | None  # [B, Hkv, 2, past + T] fp32, as in `gate.py`; None: no gate
    gate_rev_cumsum: Tensor | None  # [B, Hkv, past + T] fp32; None: no gate, or summaries
    log_decay: Tensor | None  # [N, Hkv] fp32: sums of the log gate over whole blocks
    blocks: Blocks
    state_blocks: Blocks  # blocks of the rows of b
    layout: Layout
    summaries: int  # summaries of a block; 0: tokens are added to the state
    local_weight: LocalWeight
    degree: int  # for LocalWeight.POWER
    scale: float  # above 0 for LocalWeight.EXPONENTIAL
    shift: float  # for LocalWeight.POWER
    offset: float
    local_blocks: int
    has_initial_state: bool
    keep_final_state: bool

    @property
    def past(self) -> int:
        return self.k.shape[1] - self.q.shape[1]

    @property
    def type(self) -> torch.dtype:
        """Return the dtype of features and weights as operands of a product: fp16 does not hold their range."""
        return torch.float32 if self.v.dtype == torch.float32 else torch.bfloat16

    @property
    def state_type(self) -> torch.dtype:
        """Return the dtype of the states. States of given features are small, and gradients of such features, which
        all have one sign, are small differences of large sums: they are fp32, multiplied as TF32."""
        return self.type if self.layout.pairs else torch.float32

    def gradient_type(self, x: Tensor) -> torch.dtype:
        """Return the dtype of the gradient of x, one of q, k, a, b: fp32 where q is a and k is b, since two gradients
        are then added."""
        return torch.float32 if self.q is self.a else x.dtype

    @property
    def width(self) -> int:
        """Return the width of the widest rows that a program holds."""
        return max(self.q.shape[3], self.v.shape[3], 2 * self.layout.size if self.layout.pairs else 0)

    def arguments(self, kernel) -> dict:
        """Return the arguments that `kernel` has a parameter for, by name."""
        quadratic = self.local_weight == LocalWeight.QUADRATIC
        c0, c1, c2 = self.layout.coefficients if quadratic else (0.0, 0.0, 0.0)
        D, R, DV = self.q.shape[3], self.a.shape[3], self.v.shape[3]
        known = dict(
            q=self.q,
            q_strides=self.q.stride()[:3],
            k=self.k,
            k_strides=self.k.stride()[:3],
            v=self.v,
            v_strides=self.v.stride()[:3],
            a=self.a,
            a_strides=self.a.stride()[:3],
            b=self.b,
            b_strides=self.b.stride()[:3],
            mass=self.mass,
            gate_cumsum=self.gate_cumsum,
            gate_rev_cumsum=self.gate_rev_cumsum,
            blocks=self.blocks.table,
            pair_table=self.layout.table(self.q.device),
            tokens=self.q.shape[1],
            past=self.past,
            group=self.q.shape[2] // self.v.shape[2],
            block_size=self.blocks.size,
            scale=float(self.scale),
            shift=float(self.shift),
            offset=float(self.offset),
            c0=float(c0),
            c1=float(c1),
            c2=float(c2),
            R=R,
            R_PAD=padded(R),
            D=D,
            D_PAD=padded(D),
            DV=DV,
            DV_PAD=padded(DV),
            FT=self.layout.tile,
            F=self.layout.features,
            M=self.layout.denom_elements,
            PAIRS=self.layout.pairs,
            LINEAR=self.layout.linear,
            CONSTANT=self.layout.constant,
            MASS=self.mass is not None,
            WEIGHT=self.local_weight.value,
            DEGREE=self.degree,
            LOCAL_BLOCKS=self.local_blocks,
            GATED=self.gate_cumsum is not None,
        )
        return {name: x for name, x in known.items() if name in kernel.arg_names}


def build_problem(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state_v: Tensor,
    mass: Tensor | None,
    log_gate: Tensor | None,
    blocks: Blocks,
    layout: Layout,
    summaries: int,
    local_weight: LocalWeight,
    degree: int,
    scale: float,
    shift: float,
    offset: float,
    local_blocks: int,
    has_initial_state: bool,
    keep_final_state: bool,
) -> Problem:
    """Return the problem with the gate sums of log_gate [B, past + T, Hkv] and the block table of the state's rows."""
    gate_cumsum = gate_rev_cumsum = log_decay = None
    if log_gate is not None:
        gate_cumsum, gate_rev_cumsum = gate_sums_in_blocks(log_gate, blocks)
        log_decay = block_log_decay(gate_cumsum, blocks, k.shape[1] - q.shape[1])
    state_blocks = blocks
    if summaries:  # they fade from the end of their block on
        gate_rev_cumsum = None
        state_blocks = replace(blocks, table=blocks.summary_table(v.shape[0], summaries))
    return Problem(
        q=q,
        k=k,
        v=v,
        a=a,
        b=b,
        state_v=state_v,
        mass=mass,
        gate_cumsum=gate_cumsum,
        gate_rev_cumsum=gate_rev_cumsum,
        log_decay=log_decay,
        blocks=blocks,
        state_blocks=state_blocks,
        layout=layout,
        summaries=summaries,
        local_weight=local_weight,
        degree=degree,
        scale=scale,
        shift=shift,
        offset=offset,
        local_blocks=local_blocks,
        has_initial_state=has_initial_state,
        keep_final_state=keep_final_state,
    )
