"""What every kernel of one call is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lcpt_kernels.triton.block_causal.block_table import Blocks
from lcpt_kernels.triton.block_causal.gate import log_decay_of_blocks, sums_in_blocks
from lcpt_kernels.triton.block_causal.state_layout import Layout
from lcpt_kernels.triton.common.tensors import padded


class Problem(NamedTuple):
    """q [B, T, H, D] and a [B, T, H, R] are of the last T of the keys' past + T tokens; k [B, past + T, Hkv, D] and
    v [B, past + T, Hkv, Dv]. What goes over into the state, b [B, ·, Hkv, R], far_v [B, ·, Hkv, Dv] and
    mass [B, ·, Hkv] fp32 or None, is of the same tokens, or of summaries. Last strides are 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    far_v: Tensor
    mass: Tensor | None
    since: Tensor | None  # [B, past + T, Hkv, 2] fp32: the log gate from the block's first token to t, as in `gates.py`
    until: Tensor | None  # [B, past + T, Hkv] fp32: from t + 1 to the block's last; None too: of summaries
    log_decay: Tensor | None  # [N, Hkv] fp32: over the block
    blocks: Blocks
    far_blocks: Blocks  # of the rows of b
    layout: Layout
    summaries: int  # of a block; 0: its tokens go over into the state
    degree: int  # of the local weight, as in `local.py`
    scale: float
    offset: float
    local_blocks: int
    continued: bool  # there is a state before the first token
    ended: bool  # the state after the last token is asked for

    @classmethod
    def of(cls, q, k, v, a, b, far_v, mass, log_gate, blocks, layout, summaries, *numbers) -> Problem:
        since = until = log_decay = None
        if log_gate is not None:
            since, until = sums_in_blocks(log_gate, blocks)
            log_decay = log_decay_of_blocks(since, blocks, k.shape[1] - q.shape[1])
        far_blocks = blocks
        if summaries:
            until, far_blocks = None, blocks._replace(table=blocks.of_summaries(v.shape[0], summaries))
        return cls(q, k, v, a, b, far_v, mass, since, until, log_decay, blocks, far_blocks, layout, summaries, *numbers)

    @property
    def past(self) -> int:
        return self.k.shape[1] - self.q.shape[1]

    @property
    def type(self) -> torch.dtype:
        """Of features and weights where they meet in a product: fp16 does not hold their range."""
        return torch.float32 if self.v.dtype == torch.float32 else torch.bfloat16

    @property
    def type_of_state(self) -> torch.dtype:
        """States of features that are given are small, and gradients of such features, which have all one sign, small
        differences of large sums: fp32, multiplied as TF32."""
        return self.type if self.layout.pairs else torch.float32

    def of_gradient(self, x: Tensor) -> torch.dtype:
        """Of one of q, k, a, b: with q = a and k = b gradients are sums of two."""
        return torch.float32 if self.q is self.a else x.dtype

    @property
    def width(self) -> int:
        """Of the widest rows that a program holds."""
        return max(self.q.shape[3], self.v.shape[3], 2 * self.layout.size if self.layout.pairs else 0)

    def arguments(self, kernel) -> dict:
        """Those that `kernel` has, by their names."""
        c0, c1, c2 = (0.0, 0.0, 0.0) if self.degree else self.layout.coefficients
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
            since=self.since,
            until=self.until,
            blocks=self.blocks.table,
            pair_table=self.layout.table(self.q.device),
            tokens=self.q.shape[1],
            past=self.past,
            group=self.q.shape[2] // self.v.shape[2],
            block_size=self.blocks.size,
            scale=float(self.scale),
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
            M=self.layout.norms,
            PAIRS=self.layout.pairs,
            LINEAR=self.layout.linear,
            CONSTANT=self.layout.constant,
            MASS=self.mass is not None,
            DEGREE=self.degree,
            LOCAL_BLOCKS=self.local_blocks,
            GATED=self.since is not None,
        )
        return {name: x for name, x in known.items() if name in kernel.arg_names}
