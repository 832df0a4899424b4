"""Keep the keys and values of a sequence that goes on in blocks, so that adding to them copies one block at most.

One growing tensor would be copied with every piece, and be there twice while it is. On a CPU attention reads the blocks
one by one, and merges what they give as FlashAttention does: each output by its share of the denominator.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 4096  # tokens; shorter blocks are filled up

Blocks = tuple[tuple[Tensor, Tensor], ...]  # of k and v, [B, ≤ BLOCK or a piece, Hkv, D] each, in the order of tokens


def add_keys(blocks: Blocks, k: Tensor, v: Tensor) -> Blocks:
    """Return the blocks with the keys of the next tokens. The blocks that were given stay as they are."""
    if blocks and blocks[-1][0].shape[1] + k.shape[1] <= BLOCK:
        return (*blocks[:-1], joined((blocks[-1], (k, v))))
    return (*blocks, (k.contiguous(), v.contiguous()))  # v may be a view, which would keep q and k of its projection


def joined(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Return all keys, and all values, as one tensor each."""
    k, v = (torch.cat(each, dim=1) for each in zip(*blocks, strict=True))
    return k, v


def attend_to_blocks(q: Tensor, past: Blocks, k: Tensor, v: Tensor) -> Tensor:
    """Return o [B, T, H, D] of queries that see all of `past` and, causally, k and v [B, T, Hkv, D].

    On a CPU, without a gradient. Memory is that of q for each block, whatever the number of keys.
    """
    group = q.shape[2] // k.shape[2]
    o, lse = _attend(q, k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2), causal=True)
    o = o.to(lse.dtype)
    # Heads that share keys are more queries of one head: without a mask their order is free.
    folded = q.unflatten(2, (-1, group)).movedim(3, 2).flatten(1, 2)  # [B, T · group, Hkv, D]
    for keys, values in past:
        o_b, lse_b = (
            x.unflatten(1, (-1, group)).movedim(2, 3).flatten(2, 3) for x in _attend(folded, keys, values, causal=False)
        )
        merged = torch.logaddexp(lse, lse_b)
        o = o * (lse - merged).exp()[..., None] + o_b * (lse_b - merged).exp()[..., None]
        lse = merged
    return o.to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return (o [B, T, H, D], the logarithm of the denominator, fp32 [B, T, H]) of as many heads of k and v."""
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
    )
    return o.transpose(1, 2), lse.transpose(1, 2)
