"""The formula of every feature map and, below it, of its derivative: of rows in registers, fp32.

z = x W and g = x G are [n, M], d = dφ like φ. Beyond M, where a tile is wider, z and d are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lcpt_kernels import constants

TINY = tl.constexpr(constants.TINY)


@triton.jit
def elu1(x):
    return tl.where(x > 0.0, x + 1.0, tl.exp(x))


@triton.jit
def elu1_backward(x, d):
    return tl.where(x > 0.0, d, d * tl.exp(x))


@triton.jit
def relu(z, bias):
    return tl.maximum(z + bias, 0.0, propagate_nan=tl.PropagateNan.ALL) + TINY


@triton.jit
def relu_backward(z, bias, d):
    """-> dz, and so that of the bias in every row."""
    return tl.where(z + bias > 0.0, d, 0.0)


@triton.jit
def favor(z, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return (favor_exponential(z, x, PEAK, D, M) + TINY) * M**-0.5


@triton.jit
def favor_backward(z, x, d, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """-> dz, and the factor [n, 1] of x in the dx that does not come through z."""
    d_exponents = d * favor_exponential(z, x, PEAK, D, M) * M**-0.5
    return d_exponents * D**-0.25, -(D**-0.5) * tl.sum(d_exponents, axis=1)[:, None]


@triton.jit
def favor_exponential(z, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """exp(x' W − |x'|²/2) with x' = x / D^¼, PEAK: over its greatest in each row; 0 beyond M."""
    exponents = z * D**-0.25 - (tl.sum(x * x, axis=1) * (0.5 * D**-0.5))[:, None]
    exponents = below(exponents, M)
    if PEAK:
        exponents -= tl.max(exponents, axis=1)[:, None]
    return tl.exp(exponents)


@triton.jit
def hedgehog(z, M: tl.constexpr):
    """-> both halves of φ."""
    return softmax(z, M), softmax(-z, M)


@triton.jit
def hedgehog_backward(z, d_first, d_second, M: tl.constexpr):
    first, second = hedgehog(z, M)
    return softmax_backward(first, d_first) - softmax_backward(second, d_second)


@triton.jit
def softmax(z, M: tl.constexpr):
    z = below(z, M)
    e = tl.exp(z - tl.max(z, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def softmax_backward(p, d):
    return p * (d - tl.sum(p * d, axis=1)[:, None])


@triton.jit
def softplus(z):
    u = tl.exp(-tl.abs(z))
    log = tl.where(u < 2**-8, u - 0.5 * u * u, tl.log(1.0 + u))  # a small u would be lost in 1 + u
    return tl.maximum(z, 0.0) + log


@triton.jit
def softplus_backward(z, d):
    return d * tl.sigmoid(z)


@triton.jit
def oglu(z, g):
    return softplus(z) * tl.sigmoid(g)


@triton.jit
def oglu_backward(z, g, d):
    """-> dz, dg."""
    gate = tl.sigmoid(g)
    return softplus_backward(z, d * gate), d * softplus(z) * gate * (1.0 - gate)


@triton.jit
def below(z, M: tl.constexpr):
    """z with −∞ beyond M."""
    if z.shape[1] == M:
        return z
    else:
        return tl.where((tl.arange(0, z.shape[1]) < M)[None, :], z, -float("inf"))
