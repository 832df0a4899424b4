"""Cross-entropy of rows of logits x, which their gradient replaces:

    loss = lse − x[label]        x ← p (1 + 2 z lse) − onehot(label)        lse = log Σ exp(x), p = exp(x − lse)

z is the coefficient of the z-loss. A row is read twice, a tile at a time, and written once. The second reading comes
from the cache: the rows of the two programs that a multiprocessor holds fit into its L1 up to V = 60,000 in 16 bits.
A row whose label is negative is not read; its loss and its gradient are 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tensors import on_device_of


def losses_of_logits(logits: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    """Return the loss of every row in nats, fp32 [T].

    logits [T, W], contiguous, fp32, bf16 or fp16, W ≥ V a multiple of 16: columns from `vocabulary`, V, on are padding;
    labels [T], int32 or int64.
    """
    return torch.ops.lcpt_kernels.cross_entropy(logits, labels, vocabulary)


def losses_and_gradient_in_place(logits: Tensor, labels: Tensor, vocabulary: int, z_loss: float) -> Tensor:
    """Return what `losses_of_logits` does, and replace logits by their gradient, padding by anything."""
    return torch.ops.lcpt_kernels.cross_entropy_(logits, labels, vocabulary, z_loss)


@torch.library.custom_op(
    "lcpt_kernels::cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, int vocabulary) -> Tensor",
)
def losses_only(logits, labels, vocabulary):
    return launch(logits, labels, vocabulary, 0.0, gradient=False)


@torch.library.custom_op(
    "lcpt_kernels::cross_entropy_",
    mutates_args=("logits",),
    schema="(Tensor(a!) logits, Tensor labels, int vocabulary, float z_loss) -> Tensor",
)
def losses_and_gradient(logits, labels, vocabulary, z_loss):
    return launch(logits, labels, vocabulary, z_loss, gradient=True)


@losses_only.register_fake
@losses_and_gradient.register_fake
def _(logits, labels, vocabulary, z_loss=0.0):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)  # len() would be a number for torch.compile


def launch(logits: Tensor, labels: Tensor, vocabulary: int, z_loss: float, gradient: bool) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits) == 0:
        return losses
    tiles = launch_configs.tiles("cross_entropy", vocabulary, logits.dtype)
    with on_device_of(logits):
        cross_entropy_kernel[(len(logits),)](
            logits,
            logits.stride(0),
            labels.contiguous(),
            losses,
            vocabulary,
            float(z_loss),
            GRADIENT=gradient,
            **tiles,
        )
    return losses


@triton.jit(do_not_specialize=["vocabulary"])
def cross_entropy_kernel(
    logits,  # [T, W]
    width,  # W
    labels,  # [T]
    losses,  # [T]
    vocabulary,
    z_loss,
    GRADIENT: tl.constexpr,
    BV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * width
    label = tl.load(labels + row)
    if label >= 0:
        # Read before any thread writes its part of the gradient: the sums below wait for all threads.
        own = tl.load(x + label, mask=label < vocabulary, other=float("nan")).to(tl.float32)
        largest = float("-inf")
        total = 0.0
        for start in range(0, vocabulary, BV):
            y = load_logits(x, start, width, vocabulary, BV)
            larger = tl.maximum(largest, tl.max(y, axis=0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(y - larger), axis=0)
            largest = larger
        lse = largest + tl.log(total)
        tl.store(losses + row, lse - own)
        if GRADIENT:
            scale = 1.0 + 2.0 * z_loss * lse
            for start in range(0, vocabulary, BV):
                p = scale * tl.exp(load_logits(x, start, width, vocabulary, BV) - lse)
                p = tl.where(start + tl.arange(0, BV) == label, p - 1.0, p)
                store_gradient(x, start, width, p, BV)
    else:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BV):
                store_gradient(x, start, width, tl.zeros((BV,), tl.float32), BV)


@triton.jit
def load_logits(x, start, width, vocabulary, BV: tl.constexpr):
    """Load logits of a row, fp32 [BV]: −∞ beyond the vocabulary. The mask ends with the row, at a multiple of 16, so
    that a thread loads 16 bytes at once."""
    column = start + tl.arange(0, BV)
    y = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
    return tl.where(column < vocabulary, y, float("-inf"))


@triton.jit
def store_gradient(x, start, width, values, BV: tl.constexpr):
    column = start + tl.arange(0, BV)
    tl.store(x + column, values.to(x.dtype.element_ty), mask=column < width)
