"""The registry of the Triton formulas: every feature map and its derivative, of rows in registers, fp32.

FORMULAS has the same names as FEATURE_MAPS of `feature_map_definitions.py`. All forward formulas take the same
arguments, and so do all backward formulas; each uses those that it needs.

    forward(z, g, x, PEAK, D, M) -> φ; with two halves -> first, second
    backward(d, d_second, z, g, x, PEAK, D, M) -> dz; with G -> dz, dg; with `reads_x` -> dz, x_factor

    z         [n, M] x W + b; x itself for a map without W
    g         [n, M] x G; None for a map without G
    x         [n, D] the rows
    d         [n, M] dφ; with two halves that of the first, and d_second that of the second, else None
    PEAK      the option subtract_peak
    D, M      the widths of x and z without padding
    x_factor  [n, 1]: what φ has from x directly adds x_factor · x to dx

Tiles may be wider than M; beyond M, z, g and d are 0, and what a formula returns there is not stored.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

from lcpt_kernels import constants

TINY = tl.constexpr(constants.TINY)


class Formulas(NamedTuple):
    """The two functions of a map, which the kernels take as constants."""

    forward: KernelInterface
    backward: KernelInterface
    reads_x: bool = False  # φ uses x beside z, and backward returns x_factor
    linear: bool = False  # φ is z itself, and backward returns d as it is


FORMULAS: dict[str, Formulas] = {}  # by name


@triton.jit
def elu1(z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return tl.where(z > 0.0, z + 1.0, tl.exp(z))


@triton.jit
def elu1_backward(d, d_second, z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return tl.where(z > 0.0, d, d * tl.exp(z))


FORMULAS["elu1"] = Formulas(elu1, elu1_backward)


@triton.jit
def affine(z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return z


@triton.jit
def affine_backward(d, d_second, z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return d


FORMULAS["affine"] = Formulas(affine, affine_backward, linear=True)


@triton.jit
def relu(z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + TINY


@triton.jit
def relu_backward(d, d_second, z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return tl.where(z > 0.0, d, 0.0)


FORMULAS["relu"] = Formulas(relu, relu_backward)


@triton.jit
def favor(z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return (favor_exponential(z, x, PEAK, D, M) + TINY) * M**-0.5


@triton.jit
def favor_backward(d, d_second, z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    d_exponents = d * favor_exponential(z, x, PEAK, D, M) * M**-0.5
    return d_exponents * D**-0.25, -(D**-0.5) * tl.sum(d_exponents, axis=1)[:, None]


@triton.jit
def favor_exponential(z, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """Compute exp(x' W − |x'|²/2) with x' = x / D^¼, 0 beyond M; with PEAK, divided by the largest of each row."""
    exponents = z * D**-0.25 - (tl.sum(x * x, axis=1) * (0.5 * D**-0.5))[:, None]
    exponents = mask_columns(exponents, M)
    if PEAK:
        exponents -= tl.max(exponents, axis=1)[:, None]
    return tl.exp(exponents)


FORMULAS["favor"] = Formulas(favor, favor_backward, reads_x=True)


@triton.jit
def hedgehog(z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return softmax(z, M), softmax(-z, M)


@triton.jit
def hedgehog_backward(d, d_second, z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    first, second = softmax(z, M), softmax(-z, M)
    return softmax_backward(first, d) - softmax_backward(second, d_second)


@triton.jit
def softmax(z, M: tl.constexpr):
    z = mask_columns(z, M)
    e = tl.exp(z - tl.max(z, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def softmax_backward(p, d):
    return p * (d - tl.sum(p * d, axis=1)[:, None])


FORMULAS["hedgehog"] = Formulas(hedgehog, hedgehog_backward)


@triton.jit
def softplus(z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return log1p_exp(z)


@triton.jit
def softplus_backward(d, d_second, z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return d * tl.sigmoid(z)


@triton.jit
def log1p_exp(z):
    u = tl.exp(-tl.abs(z))
    log = tl.where(u < 2**-8, u - 0.5 * u * u, tl.log(1.0 + u))  # 1 + u would lose a small u
    return tl.maximum(z, 0.0) + log


FORMULAS["softplus"] = Formulas(softplus, softplus_backward)


@triton.jit
def oglu(z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    return log1p_exp(z) * tl.sigmoid(g)


@triton.jit
def oglu_backward(d, d_second, z, g, x, PEAK: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    gate = tl.sigmoid(g)
    return d * gate * tl.sigmoid(z), d * log1p_exp(z) * gate * (1.0 - gate)


FORMULAS["oglu"] = Formulas(oglu, oglu_backward)
FORMULAS["aoglu"] = FORMULAS["oglu"]  # with G = A B


@triton.jit
def mask_columns(z, M: tl.constexpr):
    """Return z with −∞ in the columns beyond M."""
    if z.shape[1] == M:
        return z
    else:
        return tl.where((tl.arange(0, z.shape[1]) < M)[None, :], z, -float("inf"))
