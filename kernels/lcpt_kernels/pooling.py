"""Pooling: the c tokens of a whole block become r summaries, each a weighted mean of them."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels import dispatch
from lcpt_kernels.arguments import check_backend, check_sizes, require
from lcpt_kernels.autocast import under_autocast


@under_autocast
def pool_blocks(
    k: Tensor, v: Tensor, *, logits: Tensor, segments: Tensor, gamma: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """K̃ = P K, Ṽ = P (γ ∘ V) and, under a gate, the mass P γ, with P = softmax of logits + segments over a block's c
    tokens.

    k [B, N, c, Hkv, D] and v [B, N, c, Hkv, Dv] of the same dtype, N whole blocks; logits [B, N, c, Hkv, r], or
    [c, Hkv, r], the same for every block; segments [c, 1, r], constants that are added to them; gamma [B, N, c, Hkv],
    what a token has faded to by the end of its block, None: 1. Strides are free. Logits, segments and gamma meet in
    fp32, also under autocast. backend: "torch", "triton" (for a GPU) or "auto".
    -> (K̃ [B, N·r, Hkv, D] and Ṽ [B, N·r, Hkv, Dv] in k's dtype, mass [B, N·r, Hkv] fp32 or None: without gamma).
    ValueError names what does not fit.
    Source: Transformer-LS (arXiv 2107.02192), where every block has a projection of its own; γ as in gated linear
    attention (arXiv 2312.06635).
    """
    check_backend(backend, ("auto", "torch", "triton"))
    _check(k, v, logits, segments, gamma)
    segments = segments.detach()
    if dispatch.rows("pool_blocks", backend, k[:, :, 0], v.shape[4]):
        from lcpt_kernels.triton.fused.pooling import pool_blocks as in_triton

        return in_triton(k, v, logits.expand(*k.shape[:4], -1), segments, gamma)

    logits = logits if logits.dtype == torch.float64 else logits.float()
    P = (logits + segments).softmax(-3).expand(*k.shape[:4], -1)  # [B, N, c, Hkv, r]
    mass = None
    if gamma is not None:
        gamma = gamma.to(P.dtype)
        v, mass = v * gamma[..., None].to(v.dtype), torch.einsum("bnchr,bnch->bnrh", P, gamma).flatten(1, 2)
    k, v = (torch.einsum("bnchr,bnchd->bnrhd", P.to(x.dtype), x).flatten(1, 2) for x in (k, v))
    return k, v, mass


def _check(k: Tensor, v: Tensor, logits: Tensor, segments: Tensor, gamma: Tensor | None) -> None:
    for name, x in (("k", k), ("v", v)):
        require(x.ndim == 5, f"{name} has {x.ndim} dimensions {tuple(x.shape)}; [B, N, c, Hkv, D] needs 5")
    require(k.shape[2] > 0, "blocks of 0 tokens have no summaries")
    for name, x in (("k", k), ("v", v)):
        check_sizes(name, x)
    blocks = tuple(k.shape[:4])
    require(tuple(v.shape[:4]) == blocks, f"k and v disagree on [B, N, c, Hkv]: {list(blocks)}, {list(v.shape[:4])}")
    require(k.dtype == v.dtype, f"k and v differ in dtype: {k.dtype}, {v.dtype}")
    r = logits.shape[-1]
    require(r > 0, "logits are of 0 summaries")
    require(
        tuple(logits.shape) in ((*blocks, r), (*blocks[2:], r)),
        f"logits are {list(logits.shape)}; they must be {[*blocks, r]} or {[*blocks[2:], r]}",
    )
    require(tuple(segments.shape) == (blocks[2], 1, r), f"segments are {list(segments.shape)}, not {[blocks[2], 1, r]}")
    if gamma is not None:
        require(tuple(gamma.shape) == blocks, f"gamma is {list(gamma.shape)}; it must be {list(blocks)}")
