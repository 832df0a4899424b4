"""Low-rank attention: one softmax over the last blocks' tokens and the summaries of all blocks before them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lcpt_kernels import dispatch, reference
from lcpt_kernels.arguments import (
    BACKENDS,
    check_backend,
    check_packed,
    check_packed_summaries,
    check_pair,
    check_sizes,
    require,
)
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.derivatives import refuse_transforms
from lcpt_kernels.documents import each_document


@under_autocast
def lowrank_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_far: Tensor,
    k_summary: Tensor,
    v_summary: Tensor,
    *,
    summaries: int,
    scale: float | None = None,
    block_size: int = 256,
    local_blocks: int = 2,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute one softmax over the tokens of the last `local_blocks` blocks and the summaries of all blocks before
    them.

    Exponents are scale · q·k for tokens and scale · q_far·k_summary + log(c/r) for the r = `summaries` of a block of
    c = `block_size` tokens. The cost grows with T²·r/c, the memory with T.

    Args:
        q: [B, T, H, D], q_far: [B, T, H, m], k: [B, T, Hkv, D], v: [B, T, Hkv, Dv]. Floating point, any strides; H is a
            multiple of Hkv. k and v may start with keys of earlier tokens, [B, P + T, Hkv, ·], from a block's start on.
        k_summary: [B, N·r, Hkv, m], v_summary: [B, N·r, Hkv, Dv], of the N whole blocks, those before the first key
            included; in packed documents of the whole blocks of all. Further rows at the end are not used.
        summaries: r, the number of summaries of a block.
        scale: a factor of q·k; None: D^−½.
        block_size: tokens of a block, c.
        local_blocks: how many of the last blocks are exact.
        cu_seqlens: [N + 1], int32 or int64, or None: the borders of packed documents; B = 1.
        backend: "reference", "torch", "triton" (for a GPU), or "auto".

    Returns:
        o [B, T, H, Dv] in q's dtype.

    Raises:
        ValueError: a shape, dtype or option that does not fit; the message names it.

    Source: Transformer-LS (arXiv 2107.02192); the summaries' mass as in Transformer-VQ (arXiv 2309.16354).

    Example:
        >>> import torch
        >>> from lcpt_kernels import lowrank_attention
        >>> q, k, v = (torch.randn(1, 12, 2, 8) for _ in range(3))
        >>> k_summary, v_summary = (torch.randn(1, 6, 2, 8) for _ in range(2))  # 2 summaries of 3 blocks
        >>> lowrank_attention(q, k, v, q, k_summary, v_summary, summaries=2, block_size=4).shape
        torch.Size([1, 12, 2, 8])
    """
    check_backend(backend, (*BACKENDS, "triton"))
    check_pair(q, k[:, -q.shape[1] :], v[:, -q.shape[1] :], ("q", "k"))
    check_sizes("q_far", q_far)
    require(summaries > 0, f"summaries {summaries} is not positive")
    require(block_size > 0, f"block_size {block_size} is not positive")
    _check_summaries(k_summary.shape[1], summaries, block_size, k.shape[0], k.shape[1], cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if dispatch.intervals(backend, "lowrank_attention", v, q, q_far):
        from lcpt_kernels.triton.interval.lowrank import lowrank_attention as in_triton

        return in_triton(
            q,
            k,
            v,
            q_far,
            k_summary,
            v_summary,
            summaries=summaries,
            scale=scale,
            block_size=block_size,
            local_blocks=local_blocks,
            cu_seqlens=cu_seqlens,
        )

    def one(q, k, v, q_far, k_summary, v_summary):
        k, v, k_summary, v_summary = reference.per_query_head(q.shape[2], k, v, k_summary, v_summary)
        if backend == "reference":
            return reference.lowrank_attention(
                q,
                k,
                v,
                q_far,
                k_summary,
                v_summary,
                summaries=summaries,
                scale=scale,
                block_size=block_size,
                local_blocks=local_blocks,
            )
        refuse_transforms("low-rank attention", "reference")
        heads_first = [x.transpose(1, 2) for x in (q, k, v, q_far, k_summary, v_summary)]
        return _by_block(
            *heads_first, summaries=summaries, scale=scale, block_size=block_size, local_blocks=local_blocks
        ).transpose(1, 2)

    tokens = {"q": q, "k": k, "v": v, "q_far": q_far}
    of_blocks = {"k_summary": k_summary, "v_summary": v_summary}
    return each_document(one, cu_seqlens, tokens, of_blocks, block_size, summaries)


def _check_summaries(
    rows: int, summaries: int, block_size: int, batch: int, tokens: int, cu_seqlens: Tensor | None
) -> None:
    if cu_seqlens is not None:
        check_packed(cu_seqlens, batch, tokens)
        check_packed_summaries("k_summary", rows, summaries, block_size, cu_seqlens)
        return
    whole = tokens // block_size * summaries
    if rows < whole or rows % summaries != 0:  # formatted only if it fails: `arguments.py`
        raise ValueError(
            f"k_summary has {rows} rows; {summaries} summaries of every whole block of {block_size} tokens are {whole}"
        )


def _by_block(q, k, v, q_far, k_summary, v_summary, *, summaries, scale, block_size, local_blocks):
    past, keys, c = k.shape[2] - q.shape[2], k.shape[2], block_size
    before = k_summary.shape[2] // summaries - keys // c  # blocks before the first key
    outputs = []
    for t in range(past // c * c, keys, c):
        end = min(t + c, keys)
        rows, local = slice(max(t, past), end), slice(max(0, t + c - local_blocks * c), end)
        summary_rows = max(0, before + t // c - local_blocks + 1) * summaries
        queries = slice(rows.start - past, rows.stop - past)
        outputs.append(
            checkpoint(  # without it autograd keeps a copy of all summaries for every block
                _softmax,
                q[:, :, queries],
                k[:, :, local],
                v[:, :, local],
                q_far[:, :, queries],
                k_summary[:, :, :summary_rows],
                v_summary[:, :, :summary_rows],
                rows.start - local.start,
                scale,
                math.log(c / summaries),
                use_reentrant=False,
            )
        )
    return torch.cat(outputs, dim=2)


def _softmax(q, k, v, q_far, k_summary, v_summary, diagonal, scale, log_mass):
    """Return o of the rows of one block, [B, H, rows, ·]; the first sees `diagonal` local keys before itself."""
    local, state = scale * (q @ k.mT), scale * (q_far @ k_summary.mT) + log_mass
    future = torch.ones(local.shape[-2:], dtype=torch.bool, device=q.device).triu_(diagonal + 1)
    local = local.masked_fill(future, -torch.inf)
    p = torch.cat((state, local), dim=-1).softmax(-1)
    return p @ torch.cat((v_summary, v), dim=-2)
