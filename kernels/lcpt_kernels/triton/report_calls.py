"""The calls whose kernels the report compiles: short sequences, and settings that models have."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.chunked import Plan, Power, Quadratic
from lcpt_kernels.features import QuadraticFeatures
from lcpt_kernels.sparse import Sight
from lcpt_kernels.triton import sparse as in_intervals
from lcpt_kernels.triton import squared as in_blocks

BLOCK_SIZE = 256
SETTINGS = (
    {"attention": "squared", "head_dim": 64, "sketch_size": 32},
    {"attention": "squared", "head_dim": 128, "sketch_size": 32},
    {"attention": "squared", "head_dim": 64, "sketch_size": 16},
    {"attention": "squared", "head_dim": 64, "sketch_size": 64},
    {"attention": "squared", "head_dim": 64, "sketch_size": 32, "gated": True, "local_blocks": 2},
    {"attention": "squared", "head_dim": 64, "sketch_size": 64, "coefficients": (1, 1, 0.5)},  # Fastmax
    {"attention": "sparse", "head_dim": 64},
    {"attention": "sparse", "head_dim": 128},
)
FEW = (*SETTINGS[:2], *SETTINGS[-2:])  # for targets other than sm_90


def output_of(attention: str, **settings) -> Tensor:
    """The output of one of SETTINGS, where kernels start or are written down; with a graph for the backward pass."""
    return {"squared": squared, "sparse": sparse}[attention](**settings)


def tensors(tokens: int, dtype: torch.dtype, *widths: int) -> list[Tensor]:
    return [torch.zeros(1, tokens, 2, width, dtype=dtype, requires_grad=True) for width in widths]


def squared(
    head_dim: int, sketch_size: int, coefficients: tuple[float, float, float] | None = None, local_blocks: int = 1,
    gated: bool = False, dtype: torch.dtype = torch.bfloat16, tokens: int = 512,
) -> Tensor:
    """coefficients None: with q and k, degree 4, and (0, 0, 1)."""
    q, k, v, a, b = tensors(tokens, dtype, head_dim, head_dim, head_dim, sketch_size, sketch_size)
    keys = {"v": v, "b": b} if coefficients else {"k": k, "v": v, "b": b}
    if gated:
        keys["log_gate"] = torch.zeros(v.shape[:3], requires_grad=True)
    local = Quadratic(*coefficients) if coefficients else Power(4)
    features = QuadraticFeatures(sketch_size, coefficients or (0, 0, 1))
    plan = Plan(local, features, 1 / head_dim, head_dim**-4.0, BLOCK_SIZE, local_blocks)
    return in_blocks.compute(plan, a if coefficients else q, a, keys, None, False)[0]


def sparse(head_dim: int, kept: bool = True, dtype: torch.dtype = torch.bfloat16, tokens: int = 512) -> Tensor:
    q, k, v = tensors(tokens, dtype, head_dim, head_dim, head_dim)
    keep, t = torch.ones(v.shape[:3], dtype=torch.bool) if kept else None, torch.arange(tokens)
    return in_intervals.sparse_attention(q, k, v, [Sight(keep, keep, None, None, torch.zeros_like(t), t)], 1.0)
