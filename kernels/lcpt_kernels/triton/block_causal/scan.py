"""From what every block adds to the state, to the state that every block meets; and back, for gradients.

With x_n what block n adds, Λ_n its decay, and blocks n … m of one document:
    local_blocks 1:  S_{n+1} = Λ_n S_n + x_n          local_blocks 2:  S_{n+1} = Λ_n (S_n + x_{n−1})
S_n takes the place of x_n, times what queries weigh it by. Backwards the same recurrence runs from the last block to
the first: x_n is then the gradient of S_n that comes from block n itself, and the gradient of what block n added takes
its place. Sums are fp32 whatever the states are kept in.

Blocks come one after the other, numbers of a state side by side: one pass over memory. A scan in two levels would read
twice; that there is enough under way comes from loads that run AHEAD of the sums and stores before them, which no
compiler may move there by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.block_causal.block_table import Blocks
from lcpt_kernels.triton.common import launch_configs

AHEAD = tl.constexpr(6)  # blocks


def scan(
    x: Tensor,
    weights: Tensor,
    log_decay: Tensor | None,
    blocks: Blocks,
    local_blocks: int,
    before: Tensor | None,
    keep_end: bool,
    out: Tensor | None,
) -> Tensor | None:
    """x [N, H, F, E] or [N, H, F]; weights [F] fp32; log_decay [N, H] fp32 or None; before [docs, H, F, E] fp32: the
    state of the first block, None: 0; out: x or one like it, to write the states of all blocks to, None: they are not
    written. -> with keep_end, the state of the last block, like before."""
    end = torch.empty(len(blocks.documents), *x.shape[1:], device=x.device) if keep_end else None
    grid, tiles, sizes = launch(x, blocks, local_blocks)
    scan_kernel[grid](
        x,
        out,
        weights,
        log_decay,
        blocks.documents,
        before,
        end,
        tiles,
        GATED=log_decay is not None,
        BEFORE=before is not None,
        END=keep_end,
        STORE=out is not None,
        **sizes,
    )
    return end


def scan_backward(
    x: Tensor,
    weights: Tensor,
    log_decay: Tensor | None,
    blocks: Blocks,
    local_blocks: int,
    d_end: Tensor | None,
    keep_before: bool,
    met: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """In place. x, of every block the gradient of its state's features as they are; d_end, the gradient of what `scan`
    returned; met, with log_decay: x as `scan` left it. -> with keep_before, the gradient of before; with log_decay
    [N, H] fp32, the product of what goes through every block and its gradient; of a document's last block, what `scan`
    returned and its gradient."""
    d_before = torch.empty(len(blocks.documents), *x.shape[1:], device=x.device) if keep_before else None
    grid, tiles, sizes = launch(x, blocks, local_blocks)
    through = None if log_decay is None else torch.zeros(*x.shape[:2], tiles, device=x.device)
    scan_backward_kernel[grid](
        x,
        weights,
        log_decay,
        blocks.documents,
        d_end,
        d_before,
        met,
        through,
        tiles,
        GATED=log_decay is not None,
        END=d_end is not None,
        BEFORE=keep_before,
        **sizes,
    )
    return d_before, None if through is None else through.sum(2)


def launch(x: Tensor, blocks: Blocks, local_blocks: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """-> the grid, the tiles of a document, and what both kernels are given of sizes."""
    width = x.shape[3] if x.ndim == 4 else 1
    elements = x.shape[2] * width
    tiles = launch_configs.tiles("scan", len(blocks.documents) * x.shape[1] * elements)
    sizes = dict(elements=elements, WIDTH=width, LOCAL_BLOCKS=local_blocks, **tiles)
    number = triton.cdiv(elements, tiles["B"])
    return (len(blocks.documents) * number, x.shape[1]), number, sizes


@triton.jit(do_not_specialize=["tiles"])
def scan_kernel(
    x,  # [N, heads, elements]
    out,
    weights,  # [elements / WIDTH]
    log_decay,  # [N, heads]
    documents,  # [docs, 2]
    before,
    end,  # [docs, heads, elements]
    tiles,
    elements,
    WIDTH: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    BEFORE: tl.constexpr,
    END: tl.constexpr,
    STORE: tl.constexpr,
    B: tl.constexpr,
):
    document, head = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    element = tl.program_id(0) % tiles * B + tl.arange(0, B)
    mask = element < elements
    weight = tl.load(weights + element // WIDTH, mask=mask, other=0.0)
    first = tl.load(documents + document * 2)
    last = tl.load(documents + document * 2 + 1) - 1
    state = tl.zeros((B,), tl.float32)
    earlier = tl.zeros((B,), tl.float32)
    if BEFORE:
        state = tl.load(before + (document * heads + head) * elements + element, mask=mask, other=0.0)
    slot = first.to(tl.int64) * heads + head
    for _ in tl.range(first, last, num_stages=AHEAD):
        added = tl.load(x + slot * elements + element, mask=mask, other=0.0).to(tl.float32)
        if STORE:
            tl.store(out + slot * elements + element, (weight * state).to(x.dtype.element_ty), mask=mask)
        if LOCAL_BLOCKS == 2:
            state += earlier
        if GATED:
            state *= tl.exp(tl.load(log_decay + slot))
        if LOCAL_BLOCKS == 1:
            state += added
        earlier = added
        slot += heads
    if STORE:
        at = out + slot * elements + element
        tl.store(at, (weight * state).to(x.dtype.element_ty), mask=mask & (first <= last))
    if END:
        tl.store(end + (document * heads + head) * elements + element, state, mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def scan_backward_kernel(
    x,  # [N, heads, elements]
    weights,  # [elements / WIDTH]
    log_decay,  # [N, heads]
    documents,  # [docs, 2]
    d_end,
    d_before,  # [docs, heads, elements]
    met,  # [N, heads, elements]
    through,  # [N, heads, tiles]
    tiles,
    elements,
    WIDTH: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    END: tl.constexpr,
    BEFORE: tl.constexpr,
    B: tl.constexpr,
):
    document, head = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    element = tl.program_id(0) % tiles * B + tl.arange(0, B)
    mask = element < elements
    weight = tl.load(weights + element // WIDTH, mask=mask, other=0.0)
    first = tl.load(documents + document * 2)
    last = tl.load(documents + document * 2 + 1) - 1
    slot = last.to(tl.int64) * heads + head
    at = x + slot * elements + element
    some = mask & (first <= last)
    state = weight * tl.load(at, mask=some, other=0.0).to(tl.float32)
    if END:
        leaving = tl.load(d_end + (document * heads + head) * elements + element, mask=mask, other=0.0)
        state += leaving
        if GATED:
            S = tl.load(met + slot * elements + element, mask=some, other=0.0).to(tl.float32)
            S /= tl.where(weight == 0.0, 1.0, weight)
            tl.store(through + slot * tiles + tl.program_id(0) % tiles, tl.sum(S * leaving), mask=first <= last)
    later = tl.zeros((B,), tl.float32)  # the last block's keys reach no state
    tl.store(at, later.to(x.dtype.element_ty), mask=some)
    for _ in tl.range(first, last, num_stages=AHEAD):
        slot -= heads
        at = x + slot * elements + element
        own = weight * tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if LOCAL_BLOCKS == 1:
            later = state
        tl.store(at, later.to(x.dtype.element_ty), mask=mask)
        if GATED:
            # What goes through the block: S_n decayed, or of two local blocks S_{n+1}, which nothing else adds to.
            decay = tl.exp(tl.load(log_decay + slot))
            at = met + slot * elements + element
            if LOCAL_BLOCKS == 1:
                S = decay * tl.load(at, mask=mask, other=0.0).to(tl.float32)
            else:
                S = tl.load(at + heads * elements, mask=mask, other=0.0).to(tl.float32)
            S /= tl.where(weight == 0.0, 1.0, weight)
            tl.store(through + slot * tiles + tl.program_id(0) % tiles, tl.sum(S * state))
            state *= decay
        later = state
        state += own
    if BEFORE:
        tl.store(d_before + (document * heads + head) * elements + element, state, mask=mask)
