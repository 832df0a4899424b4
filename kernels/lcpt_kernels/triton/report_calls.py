"""The calls whose kernels the report compiles: short sequences, and settings that models have."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.chunked import Exponential, Linear, Plan, Power, Quadratic
from lcpt_kernels.features import Explicit, QuadraticFeatures
from lcpt_kernels.sparse import Sight
from lcpt_kernels.triton import sparse as in_intervals
from lcpt_kernels.triton.block_causal import compute

BLOCK, SUMMARIES, TOKENS = 256, 32, 512
SETTINGS = (  # what tells most first; features: of a sketch, or m
    {"attention": "squared", "head_dim": 64, "features": 32}, {"attention": "squared", "head_dim": 128, "features": 32},
    {"attention": "flurka", "head_dim": 64, "features": 64},
    {"attention": "sparse", "head_dim": 64}, {"attention": "sparse", "head_dim": 128},
    {"attention": "squared", "head_dim": 64, "features": 32, "gated": True, "local_blocks": 2},
    {"attention": "feature", "head_dim": 64, "features": 256},
    {"attention": "squared", "head_dim": 64, "features": 16}, {"attention": "squared", "head_dim": 64, "features": 64},
    {"attention": "fastmax", "head_dim": 64, "features": 64},
    {"attention": "flurka", "head_dim": 64, "features": 16}, {"attention": "flurka", "head_dim": 128, "features": 128},
    {"attention": "flurka", "head_dim": 64, "features": 256, "gated": True},
)
FEW = 5  # for targets other than sm_90


def output_of(
    attention: str, head_dim: int, dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, **others
) -> Tensor:
    """The output of a call of SETTINGS, where kernels start or are written down; with a graph for the backward pass."""

    def tensor(*size, rows=tokens):
        return torch.zeros(1, rows, 2, *size, dtype=dtype, requires_grad=True)

    if attention == "sparse":
        return sparse(tensor, head_dim, tokens, **others)
    return of_blocks(tensor, attention, head_dim, **others)


def of_blocks(
    tensor, attention: str, head_dim: int, features: int, local_blocks: int = 1, gated: bool = False
) -> Tensor:
    plan, q, a, keys = PLANS[attention](tensor, head_dim, features, local_blocks)
    if gated:
        keys["log_gate"] = tensor()
    return compute(plan, q, a, keys, None, False)[0]


def squared(tensor, head_dim, size, local_blocks):
    """plan, q, a and keys, as `compute` takes them."""
    plan = Plan(Power(4), QuadraticFeatures(size, (0, 0, 1)), 1 / head_dim, head_dim**-4.0, BLOCK, local_blocks)
    return plan, tensor(head_dim), tensor(size), {"k": tensor(head_dim), "v": tensor(head_dim), "b": tensor(size)}


def fastmax(tensor, head_dim, size, local_blocks):
    coefficients, a = (1, 1, 0.5), tensor(size)
    plan = Plan(Quadratic(*coefficients), QuadraticFeatures(size, coefficients), 1.0, 0.0, BLOCK, local_blocks)
    return plan, a, a, {"v": tensor(head_dim), "b": tensor(size)}


def feature(tensor, head_dim, size, local_blocks):
    phi = tensor(size)
    plan = Plan(Linear(), Explicit(size), 1.0, 0.0, BLOCK, local_blocks)
    return plan, phi, phi, {"v": tensor(head_dim), "b": tensor(size)}


def flurka(tensor, head_dim, size, _):
    rows = TOKENS // BLOCK * SUMMARIES
    keys = {"k": tensor(head_dim), "v": tensor(head_dim), "b": tensor(size, rows=rows),
            "far_v": tensor(head_dim, rows=rows), "mass": tensor(rows=rows)}
    plan = Plan(Exponential(), Explicit(size), head_dim**-0.5, 0.0, BLOCK, 2, SUMMARIES)
    return plan, tensor(head_dim), tensor(size), keys


PLANS = {"squared": squared, "fastmax": fastmax, "feature": feature, "flurka": flurka}


def sparse(tensor, head_dim: int, tokens: int, kept: bool = True) -> Tensor:
    t = torch.arange(tokens)
    keep = torch.ones(1, tokens, 2, dtype=torch.bool) if kept else None
    sight = Sight(keep, keep, None, None, torch.zeros_like(t), t)
    return in_intervals.sparse_attention(tensor(head_dim), tensor(head_dim), tensor(head_dim), [sight], 1.0)
