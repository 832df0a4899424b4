"""Balance the local part and the state part of a kind at initialisation: a token weighs as much on average in both.

Where one part outweighs the other, as elu1 features outweigh exponentials 49 times, a model learns to use the weaker
one late or never: its factor e^γ moves by a learning rate a step. Averages are over unrelated queries and keys, normed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 1024


def normed(head_dim: int, heads: int = 1) -> Tensor:
    """Draw LayerNormed vectors, [1, SAMPLES, heads, head_dim]."""
    return F.layer_norm(torch.randn(1, SAMPLES, heads, head_dim), (head_dim,))


@torch.no_grad()
def balance(near: Tensor | float, far: Tensor, n_heads: int) -> Tensor:
    """Compute γ [H] with e^γ · far = near; near and far are mean weights, of each key-value head or of all."""
    gamma = (torch.as_tensor(near, device=far.device) / far).log()
    return gamma.repeat_interleave(n_heads // gamma.numel())


def mean_power(scale: float, shift: float, degree: int, head_dim: int) -> float:
    """Compute E[(scale·q·k + shift)^degree], with q·k normal of variance d, as it nearly is."""
    std = scale * head_dim**0.5
    moments = (math.prod(range(1, n, 2)) * std**n for n in range(0, degree + 1, 2))  # (n − 1)!! stdⁿ
    return sum(
        math.comb(degree, n) * shift ** (degree - n) * moment
        for n, moment in zip(range(0, degree + 1, 2), moments, strict=True)
    )


MEAN_EXPONENTIAL = math.exp(0.5)  # E[e^(q·k/√d)], where q·k/√d is normal of variance 1


@torch.no_grad()
def mean_squared_product(sketch: nn.Module, n_kv_heads: int, head_dim: int) -> Tensor:
    """Compute E[(S(q)·S(k))²] = tr(E[S(q) S(q)ᵀ] E[S(k) S(k)ᵀ]) of each key-value head, [Hkv]."""
    q, k = (sketch(normed(head_dim, n_kv_heads))[0] for _ in range(2))  # [n, Hkv, r]
    moments_q, moments_k = (torch.einsum("nhr,nhs->hrs", s, s) / len(s) for s in (q, k))
    return (moments_q * moments_k).sum((1, 2))


@torch.no_grad()
def mean_product(feature_map: nn.Module, n_kv_heads: int, head_dim: int) -> Tensor:
    """Compute E[φ(q)·φ(k)] = E[φ(q)]·E[φ(k)] of each key-value head, [Hkv]."""
    q, k = (feature_map(normed(head_dim, n_kv_heads), is_query=False)[0].mean(0) for _ in range(2))  # [Hkv, m]
    return (q * k).sum(-1)
