"""pool_blocks, forward: summaries of blocks, means of their tokens weighted by a softmax of given logits:

    K̃_j = Σ_t P_tj k_t        Ṽ_j = Σ_t P_tj γ_t v_t        mass_j = Σ_t P_tj γ_t        P_tj = e^{logit_tj − lse_j}

t runs over the c tokens of a block; logit includes segments. A program computes BR summaries of one block and head. It
reads the logits twice, first for their maximum: with a running maximum every step would wait for a reduction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tensors import padded
from lcpt_kernels.triton.common.tile_io import load_rows, store_rows


class Blocks(NamedTuple):
    """The inputs of both kernels; the last strides of k, v and logits are 1, and segments is contiguous."""

    k: Tensor  # [B, N, c, H, D]
    v: Tensor  # [B, N, c, H, Dv]
    logits: Tensor  # [B, N, c, H, r]
    segments: Tensor  # [c, 1, r]
    gamma: Tensor | None  # [B, N, c, H]

    @classmethod
    def from_operator(cls, k: Tensor, v: Tensor, logits: Tensor, segments: Tensor, gamma: Tensor | None) -> Blocks:
        k, v, logits = (x if x.stride(4) == 1 else x.contiguous() for x in (k, v, logits))
        return cls(k, v, logits, segments.contiguous(), gamma)

    def tiles(self, kernel: str) -> dict[str, int]:
        """Return the tile sizes of `kernel`, with a tile of summaries no larger than needed."""
        tiles = launch_configs.tiles(kernel, max(self.k.shape[4], self.v.shape[4]), self.k.dtype)
        return tiles | {"BR": min(tiles["BR"], padded(self.logits.shape[4]))}

    def arguments(self) -> dict:
        """Return the arguments that the forward and the backward kernel share."""
        D, DV = self.k.shape[4], self.v.shape[4]
        return dict(
            k=self.k,
            k_strides=self.k.stride()[:4],
            v=self.v,
            v_strides=self.v.stride()[:4],
            logits=self.logits,
            logits_strides=self.logits.stride()[:4],
            segments=self.segments,
            gamma=self.gamma,
            gamma_strides=None if self.gamma is None else self.gamma.stride(),
            count=self.k.shape[1],
            block_size=self.k.shape[2],
            R=self.logits.shape[4],
            D=D,
            D_PAD=padded(D),
            DV=DV,
            DV_PAD=padded(DV),
            GATED=self.gamma is not None,
        )


class Pooled(NamedTuple):
    """The outputs of the forward pass, or their gradients."""

    k: Tensor  # [B, N·r, H, D]
    v: Tensor  # [B, N·r, H, Dv]
    mass: Tensor | None  # [B, N·r, H] fp32; None: without gamma


def pooling_forward(given: Blocks) -> tuple[Pooled, Tensor]:
    """Launch the forward kernel -> its outputs, and lse [B, N·r, H] fp32 of logits + segments; contiguous."""
    batch, count, _, heads, summaries = given.logits.shape
    lse = torch.empty(batch, count * summaries, heads, dtype=torch.float32, device=given.k.device)
    mass = None if given.gamma is None else torch.empty_like(lse)
    k, v = (torch.empty(*lse.shape, x.shape[4], dtype=x.dtype, device=x.device) for x in (given.k, given.v))
    tiles = given.tiles("pooling_forward")
    pieces = triton.cdiv(summaries, tiles["BR"])
    pooling_forward_kernel[(batch * count * pieces, heads)](
        **given.arguments(), k_pooled=k, v_pooled=v, mass=mass, lse=lse, pieces=pieces, **tiles
    )
    return Pooled(k, v, mass), lse


@triton.jit(do_not_specialize=["count", "block_size", "pieces"])
def pooling_forward_kernel(
    k,
    k_strides,  # [B, N, c, H, D]
    v,
    v_strides,  # [B, N, c, H, DV]
    logits,
    logits_strides,  # [B, N, c, H, R]
    segments,  # [c, R]
    gamma,
    gamma_strides,  # [B, N, c, H]
    k_pooled,  # [B, N · R, H, D]
    v_pooled,  # [B, N · R, H, DV]
    mass,
    lse,  # [B, N · R, H]
    count,
    block_size,
    pieces,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    GATED: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    batch, n = block // count, block % count
    j = tl.program_id(0) % pieces * BR + tl.arange(0, BR)
    k = block_rows(k, k_strides, batch, n, head)
    v = block_rows(v, v_strides, batch, n, head)
    logits = block_rows(logits, logits_strides, batch, n, head)

    row_max_parts = tl.full((BR, BT), float("-inf"), tl.float32)
    for first in range(0, block_size, BT):
        t = first + tl.arange(0, BT)
        x = load_logits(logits, logits_strides[2], segments, t[None, :], j[:, None], block_size, R)
        row_max_parts = tl.maximum(row_max_parts, x)
    row_max = tl.max(row_max_parts, axis=1)

    k_sums = tl.zeros((BR, D_PAD), tl.float32)
    v_sums = tl.zeros((BR, DV_PAD), tl.float32)
    norms = tl.zeros((BR, BT), tl.float32)
    masses = tl.zeros((BR, BT), tl.float32)
    for first in range(0, block_size, BT):
        t = first + tl.arange(0, BT)
        inside = t < block_size
        k_rows = load_rows(k, t, k_strides[2], inside, D, D_PAD)  # [BT, D]
        v_rows = load_rows(v, t, v_strides[2], inside, DV, DV_PAD)  # [BT, DV]
        # Summaries as rows: the products need no transposed operand.
        x = load_logits(logits, logits_strides[2], segments, t[None, :], j[:, None], block_size, R)  # [BR, BT]
        w = tl.exp(x - row_max[:, None])
        norms += w
        k_sums = tl.dot(w.to(k_rows.dtype), k_rows, k_sums, input_precision="ieee")  # [BR, BT] @ [BT, D]
        if GATED:
            w *= load_gamma(gamma, gamma_strides, batch, n, head, t, inside, GATED)[None, :]
            masses += w
        v_sums = tl.dot(w.to(v_rows.dtype), v_rows, v_sums, input_precision="ieee")

    norm = tl.sum(norms, axis=1)
    here = j < R
    row = (block.to(tl.int64) * R + j) * tl.num_programs(1) + head
    store_rows(k_pooled, row, D, here, k_sums / norm[:, None], D, D_PAD)
    store_rows(v_pooled, row, DV, here, v_sums / norm[:, None], DV, DV_PAD)
    tl.store(lse + row, row_max + tl.log(norm), mask=here)
    if GATED:
        tl.store(mass + row, tl.sum(masses, axis=1) / norm, mask=here)


@triton.jit
def block_rows(x, strides, batch, n, head):
    """Return the pointer to the rows [c, ·] of one block and head of x [B, N, c, H, ·]."""
    return x + batch.to(tl.int64) * strides[0] + n.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[3]


@triton.jit
def load_logits(logits, stride, segments, t, j, block_size, R: tl.constexpr):
    """Load logits + segments of tokens t for summaries j, which lie along two axes, in fp32.

    They are −∞ where there is no token, so that its weight is 0, and 0 where there is no summary.
    """
    token = t < block_size
    there = token & (j < R)
    x = tl.load(logits + t.to(tl.int64) * stride + j, mask=there, other=0.0).to(tl.float32)
    x += tl.load(segments + t * R + j, mask=there, other=0.0).to(tl.float32)
    return tl.where(token, x, float("-inf"))


@triton.jit
def load_gamma(gamma, strides, batch, n, head, t, inside, GATED: tl.constexpr):
    """Load γ of tokens t, 1 without a gate."""
    if GATED:
        at = block_rows(gamma, strides, batch, n, head) + t.to(tl.int64) * strides[2]
        return tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        return (t * 0 + 1).to(tl.float32)
