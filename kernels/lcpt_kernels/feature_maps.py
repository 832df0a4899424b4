"""Feature maps φ: R^d -> R^m with φ ≥ 0, so that φ(q)·φ(k) is a weight: queries or keys alone, row by row.

x [B, T, H, d], floating point, strides free, any T. Matrices [Hw, d, m] are those of key-value heads, H a multiple of
Hw, and are cast to x's dtype. Each returns φ(x) [B, T, H, m] in x's dtype, in one kernel on a GPU where d and m are up
to 128. backend: "torch", "triton" (for a GPU) or "auto". ValueError names what does not fit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lcpt_kernels import dispatch
from lcpt_kernels.arguments import check_backend, check_sizes, require
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.constants import TINY


def per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """x [B, T, H, d] times the matrix of each head's key-value head, [Hw, d, m] -> [B, T, H, m]."""
    grouped = x.unflatten(2, (matrices.shape[0], -1))
    return torch.einsum("bthgd,hdm->bthgm", grouped, matrices.to(x.dtype)).flatten(2, 3)


@under_autocast
def elu1(x: Tensor, *, backend: str = "auto") -> Tensor:
    """φ(x) = elu(x) + 1, m = d (Transformers are RNNs, arXiv 2006.16236)."""
    _check(x, backend)
    if dispatch.rows("elu1", backend, x):
        return _in_triton("elu1", x)
    return F.elu(x) + 1


@under_autocast
def relu(x: Tensor, W: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """φ(x) = relu(x W + b) + 10⁻⁶, b [Hw, m] (T2R, arXiv 2103.13076)."""
    _check(x, backend, W=W)
    require(b.shape == W[:, 0].shape, f"b is {list(b.shape)}; it must be {[len(W), W.shape[2]]}")
    if dispatch.rows("relu", backend, x, W.shape[2]):
        return _in_triton("relu", x, W, b=b)
    bias = b.repeat_interleave(x.shape[2] // len(b), dim=0)  # [H, m]
    return F.relu(per_head(x, W) + bias.to(x.dtype)) + TINY


@under_autocast
def favor(x: Tensor, W: Tensor, *, subtract_peak: bool = False, backend: str = "auto") -> Tensor:
    """φ(x) = (exp(x' W − |x'|²/2) + 10⁻⁶) / √m with x' = x / d^¼, so that E[φ(q)·φ(k)] = exp(q·k/√d) where columns of W
    are Gaussian (FAVOR+, arXiv 2009.14794).

    subtract_peak: each row's greatest exponent is taken from the others, a constant to the gradient; for queries, whose
    factors cancel against the normaliser. Exponents are fp32, W too, and a constant.
    """
    _check(x, backend, W=W)
    W = W.detach()
    if dispatch.rows("favor", backend, x, W.shape[2]):
        return _in_triton("favor", x, W, subtract_peak=subtract_peak)
    scaled = (x if x.dtype == torch.float64 else x.float()) * x.shape[-1] ** -0.25
    exponents = per_head(scaled, W) - scaled.square().sum(-1, keepdim=True) / 2
    if subtract_peak:
        exponents = exponents - exponents.detach().amax(-1, keepdim=True)
    return ((exponents.exp() + TINY) * W.shape[2] ** -0.5).to(x.dtype)


@under_autocast
def hedgehog(x: Tensor, W: Tensor, *, backend: str = "auto") -> Tensor:
    """φ(x) = [softmax(x W), softmax(−x W)], twice as wide as x W (Hedgehog, arXiv 2402.04347)."""
    _check(x, backend, W=W)
    if dispatch.rows("hedgehog", backend, x, 2 * W.shape[2]):
        return _in_triton("hedgehog", x, W)
    y = per_head(x, W)
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1)


@under_autocast
def softplus(x: Tensor, W: Tensor, *, backend: str = "auto") -> Tensor:
    """φ(x) = softplus(x W), a feed-forward kernel (arXiv 2211.04076)."""
    _check(x, backend, W=W)
    if dispatch.rows("softplus", backend, x, W.shape[2]):
        return _in_triton("softplus", x, W)
    return F.softplus(per_head(x, W))


@under_autocast
def oglu(x: Tensor, W: Tensor, G: Tensor, *, backend: str = "auto") -> Tensor:
    """φ(x) = softplus(x W) ∘ σ(x G), G like W (arXiv 2211.04076)."""
    _check(x, backend, W=W, G=G)
    require(G.shape == W.shape, f"G is {list(G.shape)}, W is {list(W.shape)}; they must be alike")
    if dispatch.rows("oglu", backend, x, W.shape[2]):
        return _in_triton("oglu", x, W, G)
    return F.softplus(per_head(x, W)) * torch.sigmoid(per_head(x, G))


@under_autocast
def aoglu(x: Tensor, W: Tensor, A: Tensor, B: Tensor, *, backend: str = "auto") -> Tensor:
    """φ(x) = softplus(x W) ∘ σ((x A) B), A [Hw, d, r] and B [Hw, r, m]: a gate of low rank (arXiv 2211.04076)."""
    _check(x, backend, W=W, A=A)
    like = [len(W), A.shape[2], W.shape[2]]
    require(list(B.shape) == like and len(A) == len(W), f"A is {list(A.shape)}, B is {list(B.shape)}; B must be {like}")
    if dispatch.rows("aoglu", backend, x, W.shape[2]):
        return _in_triton("oglu", x, W, A.to(x.dtype) @ B.to(x.dtype))
    return F.softplus(per_head(x, W)) * torch.sigmoid(per_head(per_head(x, A), B))


def _check(x: Tensor, backend: str, **matrices: Tensor) -> None:
    check_backend(backend, ("auto", "torch", "triton"))
    require(x.ndim == 4, f"x has {x.ndim} dimensions {tuple(x.shape)}; [B, T, H, d] needs 4")
    check_sizes("x", x)
    heads, width = x.shape[2:]
    for name, w in matrices.items():
        require(w.ndim == 3 and w.shape[1] == width, f"{name} is {list(w.shape)}; x is {width} wide: [Hw, {width}, m]")
        check_sizes(name, w)
        require(heads % len(w) == 0, f"{heads} heads are no multiple of {len(w)}, those of {name}")


def _in_triton(map: str, x: Tensor, *matrices: Tensor, **options) -> Tensor:
    from lcpt_kernels.triton.fused.feature_maps import feature_map

    return feature_map(map, x, *matrices, **options)
