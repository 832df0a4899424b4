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
from lcpt_kernels.streaming import each_document


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
    """A softmax of scale · q·k over the tokens of the last `local_blocks` blocks of c tokens, and of
    scale · q_far·k_summary + log(c/r) over the r = `summaries` of every block before them.

    q [B, T, H, D]; k [B, T, Hkv, D]; v [B, T, Hkv, Dv]; q_far [B, T, H, m]; k_summary [B, N·r, Hkv, m] and v_summary
    [B, N·r, Hkv, Dv] of the N whole blocks, in packed documents of those of every document and, at the end, any more,
    which nothing sees. k and v may begin with keys of earlier tokens, [B, P + T, Hkv, ·], from the beginning of a block
    on; summaries then are of all blocks so far, also of those before these keys. Cost grows with T²·r/c, memory with T.
    scale None: D^−½. backend: "reference", "torch", "triton" (for a GPU) or "auto". Returns o [B, T, H, Dv] in q's
    dtype. ValueError names what does not fit.
    Source: Transformer-LS (arXiv 2107.02192); the summaries' mass as in Transformer-VQ (arXiv 2309.16354).
    """
    check_backend(backend, (*BACKENDS, "triton"))
    check_pair(q, k[:, -q.shape[1] :], v[:, -q.shape[1] :], "qk")
    check_sizes("q_far", q_far)
    require(summaries > 0, f"summaries {summaries} is not positive")
    require(block_size > 0, f"block_size {block_size} is not positive")
    _check_summaries(k_summary.shape[1], summaries, block_size, *k.shape[:2], cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if dispatch.intervals(backend, "lowrank_attention", v, q, q_far):
        from lcpt_kernels.triton.interval.lowrank import lowrank_attention as in_triton

        return in_triton(q, k, v, q_far, k_summary, v_summary, summaries, scale, block_size, local_blocks, cu_seqlens)

    def one(q, k, v, q_far, k_summary, v_summary):
        k, v, k_summary, v_summary = reference.per_query_head(q.shape[2], k, v, k_summary, v_summary)
        if backend == "reference":
            return reference.lowrank_attention(
                q, k, v, q_far, k_summary, v_summary, summaries, scale, block_size, local_blocks
            )
        refuse_transforms("low-rank attention", "reference")
        heads_first = [x.transpose(1, 2) for x in (q, k, v, q_far, k_summary, v_summary)]
        return _by_block(*heads_first, summaries, scale, block_size, local_blocks).transpose(1, 2)

    near = {"q": q, "k": k, "v": v, "q_far": q_far}
    far = {"k_summary": k_summary, "v_summary": v_summary}
    return each_document(one, cu_seqlens, near, far, block_size, summaries)


def _check_summaries(
    rows: int, summaries: int, block_size: int, batch: int, tokens: int, cu_seqlens: Tensor | None
) -> None:
    if cu_seqlens is not None:
        check_packed(cu_seqlens, batch, tokens)
        return check_packed_summaries("k_summary", rows, summaries, block_size, cu_seqlens)
    whole = tokens // block_size * summaries
    if rows < whole or rows % summaries != 0:  # no number goes into a message that nobody needs: `check_packed`
        raise ValueError(
            f"k_summary has {rows} rows; {summaries} summaries of every whole block of {block_size} tokens are {whole}"
        )


def _by_block(q, k, v, q_far, k_summary, v_summary, summaries, scale, block_size, local_blocks):
    past, keys, c = k.shape[2] - q.shape[2], k.shape[2], block_size
    before = k_summary.shape[2] // summaries - keys // c  # blocks before the first key
    outputs = []
    for t in range(past // c * c, keys, c):
        rows, near = slice(max(t, past), min(t + c, keys)), slice(max(0, t + c - local_blocks * c), min(t + c, keys))
        far = max(0, before + t // c - local_blocks + 1) * summaries
        asking = slice(rows.start - past, rows.stop - past)
        outputs.append(
            checkpoint(  # autograd would keep a copy of all summaries for every block
                _softmax,
                q[:, :, asking],
                k[:, :, near],
                v[:, :, near],
                q_far[:, :, asking],
                k_summary[:, :, :far],
                v_summary[:, :, :far],
                rows.start - near.start,
                scale,
                math.log(c / summaries),
                use_reentrant=False,
            )
        )
    return torch.cat(outputs, dim=2)


def _softmax(q, k, v, q_far, k_summary, v_summary, diagonal, scale, log_mass):
    """Rows of one block, [B, H, rows, ·]; the first sees `diagonal` near keys before itself."""
    near, far = scale * (q @ k.mT), scale * (q_far @ k_summary.mT) + log_mass
    future = torch.ones(near.shape[-2:], dtype=torch.bool, device=q.device).triu_(diagonal + 1)
    near = near.masked_fill(future, -torch.inf)
    p = torch.cat((far, near), dim=-1).softmax(-1)
    return p @ torch.cat((v_summary, v), dim=-2)
