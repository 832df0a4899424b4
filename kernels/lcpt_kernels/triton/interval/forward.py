"""The softmax of every query over an interval of a list of keys, whose rows are gathered: FlashAttention-2.

    o_i = Σ_j p_ij v_j        p_ij = e^{scale·q_i·k_j − lse_i},  first_i ≤ j < last_i

A program holds BM queries of one head. It goes through the keys in three loops: to where all queries have begun, those
that all of them see, without a mask, and to where the last one ends. The maximum m_i is that of q·k: the scale, at
least 0 in the kernel, is a factor of the exponent, which is to the base 2. Notation: `block_causal/__init__.py`.
Source: FlashAttention-2 (arXiv 2307.08691) for the running maximum m_i, sum l_i and accumulator acc.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import head_rows, load_rows, store_rows
from lcpt_kernels.triton.interval.intervals import (
    LOG2E,
    Part,
    gather_rows,
    load_again,
    load_ends,
    load_step,
    steps,
    within,
)


def interval_forward(part: Part, type: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return o [B, T, H, Dv] of `type` and lse [B, T, H] fp32; 0 and −∞ for a query that sees no key."""
    if part.scale < 0:  # the maximum of q·k would be the minimum of the scores
        part = replace(part, q=-part.q, scale=-part.scale)
    batch, tokens, heads, width = part.q.shape
    o = torch.empty(batch, tokens, heads, part.v.shape[3], dtype=type, device=part.q.device)
    lse = torch.empty(batch, tokens, heads, dtype=torch.float32, device=part.q.device)
    tiles = launch_configs.tiles("interval_forward", max(width, part.v.shape[3]), part.type)
    pieces = triton.cdiv(tokens, tiles["BM"])
    interval_forward_kernel[(pieces * batch * heads,)](
        **part.arguments(interval_forward_kernel), o=o, lse=lse, pieces=pieces, **tiles
    )
    return o, lse


@triton.jit(do_not_specialize=["own_stride", "other_stride", "ends_stride", "tokens", "heads", "group", "pieces"])
def interval_forward_kernel(
    q,
    q_strides,  # [B, T, H, D]
    k,
    k_strides,  # [B, S, Hkv, D]
    v,
    v_strides,  # [B, S, Hkv, DV]
    own,
    own_stride,  # [N, T]: the list of queries
    other,
    other_stride,  # [N, S]: that of keys
    first,
    last,
    ends_stride,  # [N, T]
    o,  # [B, T, H, DV]
    lse,  # [B, T, H]
    tokens,
    heads,
    group,
    pieces,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    n = (tl.program_id(0) // pieces).to(tl.int64)
    batch, head = n // heads, n % heads
    i = tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = i < tokens
    t = tl.load(own + n * own_stride + i, mask=inside, other=0)
    begin, end = load_ends(first + n * ends_stride, last + n * ends_stride, i, inside)
    ends = steps(begin, end, BN)
    q_rows = load_rows(head_rows(q, q_strides, batch, head), t, q_strides[1], begin < end, D, D_PAD)
    k = head_rows(k, k_strides, batch, head // group)
    v = head_rows(v, v_strides, batch, head // group)
    other += n * other_stride

    acc = tl.zeros((BM, DV_PAD), tl.float32)
    l_i = tl.zeros((BM,), tl.float32)
    m_i = tl.full((BM,), -1e30, tl.float32)  # finite: the difference of two infinities would be NaN
    base2 = tl.maximum(scale * LOG2E, 1e-30)  # 0 times an infinity would be NaN
    for part in tl.static_range(3):  # until all rows have begun; where all see all; until the last row has ended
        for j in range(ends[part], ends[part + 1], BN):
            s = load_step(other, j, ends[3], BN, part != 1)
            k_rows = gather_rows(k, s, K_STRIDE, D, D_PAD)  # [BN, D]
            v_rows = gather_rows(v, s, V_STRIDE, DV, DV_PAD)  # [BN, DV]
            score = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
            if part != 1:
                seen = within(tl.arange(0, BN)[None, :], begin[:, None] - j, end[:, None] - j, part == 0)
                score = tl.where(seen, score, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(score, axis=1))
            shift = base2 * m_new
            p = tl.exp2(base2 * score - shift[:, None])
            alpha = tl.exp2(base2 * m_i - shift)
            l_i = l_i * alpha + tl.sum(p, axis=1)
            acc *= alpha[:, None]
            acc = tl.dot(p.to(v_rows.dtype), v_rows, acc, input_precision="ieee")  # [BM, BN] @ [BN, DV]
            m_i = m_new

    t = load_again(own + n * own_stride, i, inside)
    has_keys = begin < end
    row = (batch * tokens + t) * heads + head
    l_i = tl.where(has_keys, l_i, 1.0)
    store_rows(o, row, DV, inside, tl.where(has_keys[:, None], acc / l_i[:, None], 0.0), DV, DV_PAD)
    tl.store(lse + row, tl.where(has_keys, (base2 * m_i + tl.log2(l_i)) / LOG2E, float("-inf")), mask=inside)
