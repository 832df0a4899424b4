"""The gradient of k through the queries that see it exactly, apart from that of v: together they do not fit a program.

    dk_s = scale Σ_{t local} e^{G_t − G_s} w'(s_ts) dW_ts q_t

A program holds BN keys of one block and one key-value head; the queries of its whole group come one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.block_causal.local_weights import load_gates, load_peaks, scores, weights_and_slopes
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import load_block, load_rows, of_head, store_rows


def block_backward_dk(
    problem: Problem, do: Tensor, delta: Tensor, z: Tensor, peak: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """do [B, T, H, Dv]; delta, z and peak, as `block_forward` says, [B, T, H] fp32 -> dk [B, K, Hkv, D], fp32 where k
    is b too; and for the gate of every key Σ_t dW_ts W_ts of local queries, [B, K, Hkv] fp32 (None: no gate), with
    K = past + T."""
    p = problem
    dk = torch.empty(p.k.shape, dtype=p.of_gradient(p.k), device=p.k.device)
    near = None if p.since is None else torch.empty(p.k.shape[:3], dtype=torch.float32, device=p.k.device)
    tiles = launch_configs.tiles("block_backward_dk", max(p.q.shape[3], p.v.shape[3]), p.type)
    pieces = triton.cdiv(p.blocks.size, tiles["BN"])
    block_backward_dk_kernel[(p.blocks.count * pieces, p.v.shape[2])](
        **p.arguments(block_backward_dk_kernel),
        do=do,
        do_strides=do.stride()[:3],
        delta=delta,
        z=z,
        peak=peak,
        dk=dk,
        near=near,
        pieces=pieces,
        **tiles,
    )
    return dk, near


@triton.jit(do_not_specialize=["tokens", "past", "group", "block_size", "pieces"])
def block_backward_dk_kernel(
    q,
    q_strides,  # [B, T, H, D]
    k,
    k_strides,  # [B, past + T, Hkv, D]
    v,
    v_strides,  # [B, past + T, Hkv, DV]
    since,  # [B, past + T, Hkv, 2]: g
    do,
    do_strides,  # [B, T, H, DV]
    delta,
    z,
    peak,  # [B, T, H]
    dk,  # [B, past + T, Hkv, D]
    near,  # [B, past + T, Hkv]
    blocks,  # [N, 5]
    tokens,
    past,
    group,
    block_size,
    pieces,
    scale,
    c0,
    c1,
    c2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    DEGREE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    key_heads = tl.num_programs(1)
    heads = key_heads * group
    TYPE: tl.constexpr = tl.float32 if v.dtype.element_ty == tl.float32 else tl.bfloat16
    batch, first, stop, begin, end = load_block(blocks, block)
    lowest = first + tl.program_id(0) % pieces * BN
    s = lowest + tl.arange(0, BN)
    inside = s < stop
    k_rows = load_rows(of_head(k, k_strides, batch, head), s, k_strides[1], inside, D, D_PAD)  # [BN, D]
    v_rows = load_rows(of_head(v, v_strides, batch, head), s, v_strides[1], inside, DV, DV_PAD)  # [BN, DV]
    dk_rows = tl.zeros((BN, D_PAD), tl.float32)
    near_rows = tl.zeros((BN,), tl.float32)
    last = tl.minimum(end, first + LOCAL_BLOCKS * block_size)
    gates = batch * (tokens + past) * key_heads + head  # of the key head's first
    g, g_rest = load_gates(since, gates, s, key_heads, inside, GATED)
    g_block, block_rest = load_gates(since, gates, stop - 1, key_heads, first < stop, GATED and LOCAL_BLOCKS == 2)
    q, do = of_head(q, q_strides, batch, head * group), of_head(do, do_strides, batch, head * group)
    for h in range(0, group):
        for m in range(tl.maximum(lowest, past), last, BM):
            t = m + tl.arange(0, BM)
            q_rows = load_rows(q, t - past, q_strides[1], t < last, D, D_PAD)  # [BM, D]
            query = (batch * tokens + t - past) * heads + head * group + h
            do_rows = load_rows(do, t - past, do_strides[1], t < last, DV, DV_PAD)  # [BM, DV]
            delta_rows = tl.load(delta + query, mask=t < last, other=0.0)  # [BM]
            peaks = load_peaks(peak, query, t < last, DEGREE)
            g_t, t_rest = load_gates(since, gates, t, key_heads, t < last, GATED)
            g_t += tl.where(t >= stop, g_block, 0.0)
            t_rest += tl.where(t >= stop, block_rest, 0.0)
            log_decay = (g_t[None, :] - g[:, None]) + (t_rest[None, :] - g_rest[:, None])
            w, slope = weights_and_slopes(  # [BN, BM]
                scores(k_rows, q_rows, scale),
                s[:, None] <= t[None, :],
                log_decay,
                peaks[None, :],
                c0,
                c1,
                c2,
                DEGREE,
                GATED,
            )
            dw = tl.dot(v_rows, tl.trans(do_rows), input_precision="ieee") + delta_rows[None, :]
            dw /= tl.load(z + query, mask=t < last, other=1.0)[None, :]
            if GATED:
                near_rows += tl.sum(w * dw, axis=1)
            ds = (slope * dw).to(TYPE)
            dk_rows = tl.dot(ds, q_rows.to(TYPE), dk_rows, input_precision="ieee")  # [BN, BM] @ [BM, D]
        q += q_strides[2]
        do += do_strides[2]
    row = (batch * (tokens + past) + s) * key_heads + head
    store_rows(dk, row, D, inside, scale * dk_rows, D, D_PAD)
    if GATED:
        tl.store(near + row, near_rows, mask=inside)
