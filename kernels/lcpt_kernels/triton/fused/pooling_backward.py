"""pool_blocks, backward: the weights P are recomputed from the logits and lse:

    dk_t = Σ_j P_tj dK̃_j        dv_t = γ_t Σ_j P_tj dṼ_j        dγ_t = Σ_j P_tj (v_t·dṼ_j + dmass_j)
    dlogit_tj = P_tj (dP_tj − δ_j)        dP_tj = k_t·dK̃_j + γ_t (v_t·dṼ_j + dmass_j)        δ_j = Σ_t P_tj dP_tj

A program processes one block and head, and loops over its tokens twice: for δ, then for the rest. δ also equals
K̃_j·dK̃_j + Ṽ_j·dṼ_j + mass_j dmass_j, but K̃ and Ṽ are rounded: what all tokens of a block have in common would then not
cancel in dP − δ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tile_io import head_rows, load_rows, store_columns, store_rows
from lcpt_kernels.triton.fused.pooling_forward import Blocks, Pooled, block_rows, load_gamma, load_logits


def pooling_backward(given: Blocks, lse: Tensor, d: Pooled) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launch the backward kernel.

    lse [B, N·r, H] fp32; d: the gradients of the outputs, last strides 1, that of the mass contiguous
    -> the gradients of k, v, logits and gamma (None without gamma), contiguous.
    """
    dk, dv, d_logits = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (given.k, given.v, given.logits))
    d_gamma = None
    if given.gamma is not None:
        d_gamma = torch.empty(given.gamma.shape, dtype=given.gamma.dtype, device=given.gamma.device)
    batch, count, _, heads, summaries = given.logits.shape
    tiles = given.tiles("pooling_backward")
    pooling_backward_kernel[(batch * count, heads)](
        **given.arguments(),
        lse=lse,
        dk_pooled=d.k,
        dk_pooled_strides=d.k.stride()[:3],
        dv_pooled=d.v,
        dv_pooled_strides=d.v.stride()[:3],
        d_mass=d.mass,
        dk=dk,
        dv=dv,
        d_logits=d_logits,
        d_gamma=d_gamma,
        PIECES=triton.next_power_of_2(triton.cdiv(summaries, tiles["BR"])),
        **tiles,
    )
    return dk, dv, d_logits, d_gamma


@triton.jit(do_not_specialize=["count", "block_size"])
def pooling_backward_kernel(
    k,
    k_strides,  # [B, N, c, H, D]
    v,
    v_strides,  # [B, N, c, H, DV]
    logits,
    logits_strides,  # [B, N, c, H, R]
    segments,  # [c, R]
    gamma,
    gamma_strides,  # [B, N, c, H]
    lse,  # [B, N · R, H]
    dk_pooled,
    dk_pooled_strides,  # [B, N · R, H, D]
    dv_pooled,
    dv_pooled_strides,  # [B, N · R, H, DV]
    d_mass,  # [B, N · R, H]
    dk,  # [B, N, c, H, D]
    dv,  # [B, N, c, H, DV]
    d_logits,  # [B, N, c, H, R]
    d_gamma,  # [B, N, c, H]
    count,
    block_size,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    GATED: tl.constexpr,
    PIECES: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    batch, n = block // count, block % count
    heads = tl.num_programs(1)
    k = block_rows(k, k_strides, batch, n, head)
    v = block_rows(v, v_strides, batch, n, head)
    logits = block_rows(logits, logits_strides, batch, n, head)
    dk_pooled = head_rows(dk_pooled, dk_pooled_strides, batch.to(tl.int64), head)
    dv_pooled = head_rows(dv_pooled, dv_pooled_strides, batch.to(tl.int64), head)
    pieces = tl.arange(0, PIECES)[:, None]

    deltas = tl.zeros((PIECES, BR), tl.float32)
    for piece in range(0, tl.cdiv(R, BR)):
        j = piece * BR + tl.arange(0, BR)
        here = j < R
        summary = (block.to(tl.int64) * R + j) * heads + head
        dk_rows = load_rows(dk_pooled, n * R + j, dk_pooled_strides[1], here, D, D_PAD)  # [BR, D]
        dv_rows = load_rows(dv_pooled, n * R + j, dv_pooled_strides[1], here, DV, DV_PAD)  # [BR, DV]
        sums = tl.zeros((BT, BR), tl.float32)
        for first in range(0, block_size, BT):
            t = first + tl.arange(0, BT)
            inside = t < block_size
            k_rows = load_rows(k, t, k_strides[2], inside, D, D_PAD)  # [BT, D]
            v_rows = load_rows(v, t, v_strides[2], inside, DV, DV_PAD)  # [BT, DV]
            gamma_rows = load_gamma(gamma, gamma_strides, batch, n, head, t, inside, GATED)
            p = weights(logits, logits_strides[2], segments, t, j, block_size, lse, summary, R)
            dm = load_mass(d_mass, summary, here, GATED)
            dp, _ = weight_gradients(k_rows, v_rows, gamma_rows, dk_rows, dv_rows, dm, GATED)
            sums += p * dp
        deltas = tl.where(pieces == piece, tl.sum(sums, axis=0)[None, :], deltas)

    for first in range(0, block_size, BT):
        t = first + tl.arange(0, BT)
        inside = t < block_size
        k_rows = load_rows(k, t, k_strides[2], inside, D, D_PAD)
        v_rows = load_rows(v, t, v_strides[2], inside, DV, DV_PAD)
        gamma_rows = load_gamma(gamma, gamma_strides, batch, n, head, t, inside, GATED)
        row = (block.to(tl.int64) * block_size + t) * heads + head
        k_sums = tl.zeros((BT, D_PAD), tl.float32)
        v_sums = tl.zeros((BT, DV_PAD), tl.float32)
        gamma_sums = tl.zeros((BT,), tl.float32)
        for piece in range(0, tl.cdiv(R, BR)):
            j = piece * BR + tl.arange(0, BR)
            here = j < R
            summary = (block.to(tl.int64) * R + j) * heads + head
            dk_rows = load_rows(dk_pooled, n * R + j, dk_pooled_strides[1], here, D, D_PAD)
            dv_rows = load_rows(dv_pooled, n * R + j, dv_pooled_strides[1], here, DV, DV_PAD)
            p = weights(logits, logits_strides[2], segments, t, j, block_size, lse, summary, R)
            dm = load_mass(d_mass, summary, here, GATED)
            dp, faded = weight_gradients(k_rows, v_rows, gamma_rows, dk_rows, dv_rows, dm, GATED)
            delta = tl.sum(tl.where(pieces == piece, deltas, 0.0), axis=0)
            store_columns(d_logits, row, R, inside, p * (dp - delta[None, :]), piece * BR, R, BR)
            k_sums = tl.dot(p.to(dk_rows.dtype), dk_rows, k_sums, input_precision="ieee")  # [BT, BR] @ [BR, D]
            v_sums = tl.dot(p.to(dv_rows.dtype), dv_rows, v_sums, input_precision="ieee")
            if GATED:
                gamma_sums += tl.sum(p * faded, axis=1)
        store_rows(dk, row, D, inside, k_sums, D, D_PAD)
        if GATED:
            tl.store(d_gamma + row, gamma_sums, mask=inside)
            v_sums *= gamma_rows[:, None]
        store_rows(dv, row, DV, inside, v_sums, DV, DV_PAD)


@triton.jit
def weights(logits, stride, segments, t, j, block_size, lse, summary, R: tl.constexpr):
    """Compute P of the tokens t for the summaries j, [BT, BR].

    Where there is no summary P is any finite value; the gradients there are 0.
    """
    x = load_logits(logits, stride, segments, t[:, None], j[None, :], block_size, R)
    return tl.exp(x - tl.load(lse + summary, mask=j < R, other=0.0)[None, :])


@triton.jit
def weight_gradients(k_rows, v_rows, gamma_rows, dk_rows, dv_rows, dm, GATED: tl.constexpr):
    """Compute dP and its part that γ multiplies, before the product with γ; both [BT, BR]."""
    faded = tl.dot(v_rows, tl.trans(dv_rows), input_precision="ieee")
    dp = faded
    if GATED:
        faded += dm[None, :]
        dp = gamma_rows[:, None] * faded
    return tl.dot(k_rows, tl.trans(dk_rows), dp, input_precision="ieee"), faded


@triton.jit
def load_mass(d_mass, summary, here, GATED: tl.constexpr):
    """Load the gradient of the mass, 0 without a gate."""
    if GATED:
        return tl.load(d_mass + summary, mask=here, other=0.0)
    else:
        return (summary * 0).to(tl.float32)
