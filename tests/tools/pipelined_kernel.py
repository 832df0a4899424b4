"""A kernel whose loop computes the left operand of its product."""

import triton
import triton.language as tl


@triton.jit
def pipelined_kernel(x, y, out, steps, BT: tl.constexpr):
    """Σ (x ∘ x)ᵀ y of rows of 64."""
    column, row = tl.arange(0, 64), tl.arange(0, BT)
    acc = tl.zeros((64, 64), tl.float32)
    for step in range(0, steps):
        at = (step * BT + row) * 64
        x_rows = tl.load(x + at[None, :] + column[:, None])
        acc = tl.dot(x_rows * x_rows, tl.load(y + at[:, None] + column[None, :]), acc)
    tl.store(out + column[:, None] * 64 + column[None, :], acc)
