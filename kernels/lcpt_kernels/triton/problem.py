"""What every kernel of one call of squared attention is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lcpt_kernels.chunked import Plan, Power
from lcpt_kernels.triton.blocks import Blocks
from lcpt_kernels.triton.gates import log_decay_of_blocks, sums_in_blocks
from lcpt_kernels.triton.layout import Layout


class Problem(NamedTuple):
    """q [B, T, H, D] and a [B, T, H, R] are of the last T of the keys' past + T tokens; k [B, past + T, Hkv, D],
    v [B, past + T, Hkv, Dv], b [B, past + T, Hkv, R]. Last strides are 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    since: Tensor | None  # [B, past + T, Hkv] fp32: the log gate summed from the block's first token to t
    until: Tensor | None  # [B, past + T, Hkv] fp32: from t + 1 to the block's last
    log_decay: Tensor | None  # [N, Hkv] fp32: over the block
    blocks: Blocks
    plan: Plan
    layout: Layout
    continued: bool  # there is a state before the first token
    ended: bool  # the state after the last token is asked for

    @classmethod
    def of(cls, q, k, v, a, b, log_gate, blocks, plan, layout, continued, ended) -> Problem:
        since = until = log_decay = None
        if log_gate is not None:
            since, until = sums_in_blocks(log_gate, blocks)
            log_decay = log_decay_of_blocks(since, blocks, k.shape[1] - q.shape[1])
        return cls(q, k, v, a, b, since, until, log_decay, blocks, plan, layout, continued, ended)

    @property
    def past(self) -> int:
        return self.k.shape[1] - self.q.shape[1]

    @property
    def type(self) -> torch.dtype:
        """Of states, features and weights where they meet in a product: fp16 does not hold their range."""
        return torch.float32 if self.v.dtype == torch.float32 else torch.bfloat16

    @property
    def exact(self) -> bool:
        """Local weights are powers of q·k; else q is a and k is b."""
        return isinstance(self.plan.local, Power)

    def arguments(self, kernel) -> dict:
        """Those that `kernel` has, by their names."""
        c0, c1, c2 = (0.0, 0.0, 0.0) if self.exact else self.plan.local
        D, R, DV = self.q.shape[3], self.a.shape[3], self.v.shape[3]
        known = dict(
            q=self.q, q_strides=self.q.stride()[:3], k=self.k, k_strides=self.k.stride()[:3],
            v=self.v, v_strides=self.v.stride()[:3], a=self.a, a_strides=self.a.stride()[:3],
            b=self.b, b_strides=self.b.stride()[:3], since=self.since, until=self.until, blocks=self.blocks.table,
            pair_table=self.layout.table(self.q.device),
            tokens=self.q.shape[1], past=self.past, group=self.q.shape[2] // self.v.shape[2],
            block_size=self.blocks.size, scale=float(self.plan.scale), offset=float(self.plan.offset),
            c0=float(c0), c1=float(c1), c2=float(c2),
            R=R, R_PAD=padded(R), D=D, D_PAD=padded(D), DV=DV, DV_PAD=padded(DV),
            F=self.layout.features, M=self.layout.norms, PAIRS=self.layout.pairs, LINEAR=self.layout.linear,
            CONSTANT=self.layout.constant, DEGREE=self.plan.local.degree if self.exact else 0,
            LOCAL_BLOCKS=self.plan.local_blocks, GATED=self.since is not None,
        )
        return {name: x for name, x in known.items() if name in kernel.arg_names}


def padded(width: int) -> int:
    """Of a tile: a power of two, and as wide as a tensor core needs."""
    return max(16, triton.next_power_of_2(width))
