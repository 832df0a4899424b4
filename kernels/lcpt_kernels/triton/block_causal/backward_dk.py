"""The gradient of k through its local queries. That of v has a kernel of its own: one program cannot hold both.

    dk_s = scale Σ_{t local} e^{G_t − G_s} w'(s_ts) dW_ts q_t

A program holds BN keys of one block and one key-value head, and goes through the query heads of its group one after
the other. Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.block_causal.local_weights import (
    load_gate_cumsum,
    load_step_gate_cumsum,
    load_step_row_max,
    scores,
    weights_and_slopes,
)
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import head_rows, load_block, load_once, load_rows, load_tile, store_tile


def block_backward_dk(
    problem: Problem, do: Tensor, delta: Tensor, reciprocal: Tensor, row_max: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return dk [B, past + T, Hkv, D], fp32 where k is b too, and under a gate Σ_t dW_ts W_ts over the local queries of
    each key, [B, Hkv, past + T] fp32, else None. do is [B, T, H, Dv]; delta, reciprocal and row_max are [B, H, T]
    fp32, the first two from `backward_delta`, the last from `block_forward`."""
    p = problem
    dk = torch.empty(p.k.shape, dtype=p.gradient_type(p.k), device=p.k.device)
    batch, keys, heads, _ = p.k.shape
    dgate_local = None if p.gate_cumsum is None else p.k.new_empty(batch, heads, keys, dtype=torch.float32)
    name = "block_backward_dk" if p.gate_cumsum is None else "block_backward_dk_gated"
    tiles = launch_configs.tiles(name, max(p.q.shape[3], p.v.shape[3]), p.type)
    pieces = triton.cdiv(p.blocks.size, tiles["BN"])
    block_backward_dk_kernel[(p.blocks.count * pieces, p.v.shape[2])](
        **p.arguments(block_backward_dk_kernel),
        do=do,
        do_strides=do.stride()[:3],
        delta=delta,
        reciprocal=reciprocal,
        row_max=row_max,
        dk=dk,
        dgate_local=dgate_local,
        pieces=pieces,
        **tiles,
    )
    return dk, dgate_local


@triton.jit(do_not_specialize=["tokens", "past", "group", "block_size", "pieces"])
def block_backward_dk_kernel(
    q,
    q_strides,  # [B, T, H, D]
    k,
    k_strides,  # [B, past + T, Hkv, D]
    v,
    v_strides,  # [B, past + T, Hkv, DV]
    gate_cumsum,  # [B, Hkv, 2, past + T]: g
    do,
    do_strides,  # [B, T, H, DV]
    delta,
    reciprocal,
    row_max,  # [B, H, T]
    dk,  # [B, past + T, Hkv, D]
    dgate_local,  # [B, Hkv, past + T]
    blocks,  # [N, 5]
    tokens,
    past,
    group,
    block_size,
    pieces,
    scale,
    shift,
    c0,
    c1,
    c2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    DEGREE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    key_heads = tl.num_programs(1)
    TYPE: tl.constexpr = tl.float32 if v.dtype.element_ty == tl.float32 else tl.bfloat16
    batch, first, stop, begin, end = load_block(blocks, block)
    lowest = first + tl.program_id(0) % pieces * BN
    s = lowest + tl.arange(0, BN)
    inside = s < stop
    k_rows = load_rows(head_rows(k, k_strides, batch, head), s, k_strides[1], inside, D, D_PAD)  # [BN, D]
    v_rows = load_rows(head_rows(v, v_strides, batch, head), s, v_strides[1], inside, DV, DV_PAD)  # [BN, DV]
    dk_rows = tl.zeros((BN, D_PAD), tl.float32)
    dgate_local_rows = tl.zeros((BN,), tl.float32)
    last = tl.minimum(end, first + LOCAL_BLOCKS * block_size)
    keys = tokens + past
    gates = (batch * key_heads + head) * 2 * keys  # the place of the key head's gate sums
    g, g_rest = load_gate_cumsum(gate_cumsum, gates, s, keys, inside, GATED)
    g_block, block_rest = load_gate_cumsum(
        gate_cumsum, gates, stop - 1, keys, first < stop, GATED and LOCAL_BLOCKS == 2
    )
    q, do = head_rows(q, q_strides, batch, head * group), head_rows(do, do_strides, batch, head * group)
    for h in range(0, group):
        queries = (batch * (key_heads * group) + head * group + h) * tokens - past  # the place of the head's token 0
        for m in range(tl.maximum(lowest, past), last, BM):
            t = m + tl.arange(0, BM)
            local = tl.arange(0, BM) < last - m
            q_m = q + (m - past).to(tl.int64) * q_strides[1]
            do_m = do + (m - past).to(tl.int64) * do_strides[1]
            q_rows = load_tile(q_m, q_strides[1], local, 0, D, D_PAD, D != D_PAD)  # [BM, D]
            do_rows = load_tile(do_m, do_strides[1], local, 0, DV, DV_PAD, DV != DV_PAD)  # [BM, DV]
            delta_rows = load_once(delta + queries + m, local)  # [BM]
            m_i = load_step_row_max(row_max, queries + m, local, WEIGHT)
            g_t, t_rest = load_step_gate_cumsum(gate_cumsum, gates + m, keys, local, GATED)
            g_t += tl.where(t >= stop, g_block, 0.0)
            t_rest += tl.where(t >= stop, block_rest, 0.0)
            log_decay = (g_t[None, :] - g[:, None]) + (t_rest[None, :] - g_rest[:, None])
            w, slope = weights_and_slopes(  # [BN, BM]
                scores(k_rows, q_rows, scale, WEIGHT),
                (s - m)[:, None] <= tl.arange(0, BM)[None, :],  # s <= t, as comparisons with constants
                m < lowest + BN,
                log_decay,
                m_i[None, :],
                shift,
                c0,
                c1,
                c2,
                WEIGHT,
                DEGREE,
                GATED,
            )
            dw = tl.dot(v_rows, tl.trans(do_rows), input_precision="ieee") + delta_rows[None, :]
            dw *= load_once(reciprocal + queries + m, local)[None, :]
            if GATED:
                dgate_local_rows += tl.sum(w * dw, axis=1)
            ds = (slope * dw).to(TYPE)
            dk_rows = tl.dot(ds, q_rows.to(TYPE), dk_rows, input_precision="ieee")  # [BN, BM] @ [BM, D]
        q += q_strides[2]
        do += do_strides[2]
    n = tl.arange(0, BN)  # places as numbers from `lowest` on, which take few registers through the loops
    dk += ((batch * keys + lowest) * key_heads + head) * D
    store_tile(dk, n * key_heads, n < stop - lowest, scale * dk_rows, D, D_PAD)
    if GATED:
        tl.store(dgate_local + (batch * key_heads + head) * keys + s, dgate_local_rows, mask=inside)
