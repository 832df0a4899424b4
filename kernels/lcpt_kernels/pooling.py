"""Pooling: r summaries of every whole block of c tokens, each a weighted mean of these tokens."""

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
    """Pool the tokens of each block: K̃ = P K, Ṽ = P (γ ∘ V) and, under a gate, mass = P γ.

    P is the softmax of logits + segments over the c tokens of a block. Transformer-LS (arXiv 2107.02192) gives every
    block a projection of its own in this way; γ is from gated linear attention (arXiv 2312.06635). Logits, segments
    and gamma are added and multiplied in fp32, under autocast too.

    Args:
        k: [B, N, c, Hkv, D], N whole blocks, any strides.
        v: [B, N, c, Hkv, Dv], the dtype of k.
        logits: [B, N, c, Hkv, r], or [c, Hkv, r], the same for every block.
        segments: [c, 1, r], constants added to the logits.
        gamma: [B, N, c, Hkv], the factor by which a token has decayed at the end of its block; None means 1.
        backend: "torch", "triton" (for a GPU) or "auto".

    Returns:
        (K̃ [B, N·r, Hkv, D], Ṽ [B, N·r, Hkv, Dv], both in k's dtype, mass [B, N·r, Hkv] fp32 or None without gamma).

    Raises:
        ValueError: names a shape or a dtype that does not fit.

    Example:
        >>> k, v = torch.ones(1, 3, 4, 2, 8), torch.arange(96.0).view(1, 3, 4, 2, 4)
        >>> mean_k, mean_v, mass = pool_blocks(k, v, logits=torch.zeros(4, 2, 1), segments=torch.zeros(4, 1, 1))
        >>> mean_k.shape, mean_v[0, 0, 0], mass
        (torch.Size([1, 3, 2, 8]), tensor([12., 13., 14., 15.]), None)
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
    require(r > 0, "logits have 0 summaries")
    require(
        tuple(logits.shape) in ((*blocks, r), (*blocks[2:], r)),
        f"logits are {list(logits.shape)}; they must be {[*blocks, r]} or {[*blocks[2:], r]}",
    )
    require(tuple(segments.shape) == (blocks[2], 1, r), f"segments are {list(segments.shape)}, not {[blocks[2], 1, r]}")
    if gamma is not None:
        require(tuple(gamma.shape) == blocks, f"gamma is {list(gamma.shape)}; it must be {list(blocks)}")
