"""The calls whose kernels the report compiles: short sequences, and settings that models have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lcpt_kernels import dispatch
from lcpt_kernels.cross_entropy import linear_cross_entropy, linear_token_losses
from lcpt_kernels.feature_maps import FEATURE_MAPS, feature_map, matrix_shapes
from lcpt_kernels.local_weights import Exponential, Linear, Power, Quadratic
from lcpt_kernels.plan import Plan
from lcpt_kernels.symmetric_features import Explicit, QuadraticFeatures
from lcpt_kernels.triton.block_causal import compute
from lcpt_kernels.triton.fused.add_norm import add_norm
from lcpt_kernels.triton.fused.gated_activation import gated_activation
from lcpt_kernels.triton.fused.learned_sketch import learned_sketch
from lcpt_kernels.triton.fused.norm_rotary import norm_rotary
from lcpt_kernels.triton.fused.pooling import pool_blocks
from lcpt_kernels.triton.interval import sparse as in_intervals
from lcpt_kernels.visibility import VisibleRange

BLOCK, SUMMARIES, TOKENS = 256, 32, 512
LONG = 48 * BLOCK  # walked through in pieces
SETTINGS: tuple[dict[str, Any], ...] = (  # the most telling first; features: the width of a sketch, or m
    {"of": "squared", "head_dim": 64, "features": 32},
    {"of": "squared", "head_dim": 128, "features": 32},
    {"of": "flurka", "head_dim": 64, "features": 64},
    {"of": "sparse", "head_dim": 64},
    {"of": "sparse", "head_dim": 128},
    {"of": "heads", "head_dim": 64},
    {"of": "heads", "head_dim": 64, "key_shift": True},
    {"of": "map", "head_dim": 64, "map": "affine", "size": 32},  # the linear sketch
    {"of": "sketch", "head_dim": 64, "size": 32},
    {"of": "map", "head_dim": 64, "map": "elu1"},
    {"of": "map", "head_dim": 64, "map": "hedgehog"},
    {"of": "summaries", "head_dim": 64},
    {"of": "loss", "head_dim": 64, "vocabulary": 32000},
    {"of": "gate", "head_dim": 2048},
    {"of": "norm", "head_dim": 768},
    {"of": "squared", "head_dim": 64, "features": 32, "gated": True, "local_blocks": 2},
    {"of": "feature", "head_dim": 64, "features": 256},
    {"of": "squared", "head_dim": 64, "features": 16},
    {"of": "squared", "head_dim": 64, "features": 64},
    {"of": "fastmax", "head_dim": 64, "features": 64},
    {"of": "flurka", "head_dim": 64, "features": 16},
    {"of": "flurka", "head_dim": 128, "features": 128},
    {"of": "flurka", "head_dim": 64, "features": 256, "gated": True},
    {"of": "squared", "head_dim": 64, "features": 32, "tokens": LONG},
    {"of": "squared", "head_dim": 64, "features": 32, "gated": True, "tokens": LONG},
    {"of": "feature", "head_dim": 64, "features": 256, "tokens": LONG},
    {"of": "squared", "head_dim": 64, "features": 32, "two_passes": True},
    {"of": "squared", "head_dim": 128, "features": 32, "two_passes": True},
    {"of": "squared", "head_dim": 64, "features": 32, "gated": True, "local_blocks": 2, "two_passes": True},
    {"of": "feature", "head_dim": 64, "features": 256, "two_passes": True},
    {"of": "fastmax", "head_dim": 64, "features": 64, "two_passes": True},
    {"of": "squared", "head_dim": 64, "features": 32, "decoding": True},
    {"of": "squared", "head_dim": 128, "features": 64, "gated": True, "decoding": True},
    {"of": "fastmax", "head_dim": 64, "features": 64, "decoding": True},
    {"of": "feature", "head_dim": 64, "features": 256, "decoding": True},
    {"of": "flurka", "head_dim": 64, "features": 64, "decoding": True},
    {"of": "heads", "head_dim": 128, "keep_plain": True},
    {"of": "heads", "head_dim": 128, "keep_plain": True, "key_shift": True, "streamed": True},
    {"of": "summaries", "head_dim": 128, "gated": True},
    {"of": "sparse", "head_dim": 64, "kept": False, "hashed": True},
    *({"of": "sketch", "head_dim": width, "size": size} for width, size in ((64, 8), (128, 32), (64, 64))),
    {"of": "map", "head_dim": 128, "map": "affine", "size": 64},
    *({"of": "map", "head_dim": 64, "map": map} for map in FEATURE_MAPS if map not in ("affine", "elu1", "hedgehog")),
    {"of": "map", "head_dim": 128, "map": "oglu"},
    *({"of": "loss", "head_dim": 64, "vocabulary": size} for size in (1000, 5000)),
    {"of": "gate", "head_dim": 2048, "activation": "silu"},
    {"of": "norm", "head_dim": 768, "added": False},
    *({"of": "norm", "head_dim": width, "rms": True} for width in (256, 2048, 8192)),
    *({"of": "norm", "head_dim": width, "bias": True} for width in (1024, 4096)),
)
FEW = 15  # for targets other than sm_90


def output_of(of: str, head_dim: int, dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS, **others) -> Tensor:
    """Return the output of one of SETTINGS, with a graph for the backward pass; its kernels start or are recorded."""

    def tensor(*size, rows=tokens):
        return torch.zeros(1, rows, 2, *size, dtype=dtype, requires_grad=True)

    if of in PLANS:
        return block_causal_output(tensor, of, head_dim, **others)
    return OTHERS[of](tensor, head_dim, tokens, **others)


def block_causal_output(
    tensor,
    attention: str,
    head_dim: int,
    features: int,
    local_blocks: int = 1,
    gated: bool = False,
    two_passes: bool = False,
    decoding: bool = False,
) -> Tensor:
    """two_passes: as with an exchange. decoding: one token, whose output has no graph."""
    plan, q, a, keys = PLANS[attention](tensor, head_dim, features, local_blocks)
    if gated:
        keys["log_gate"] = tensor()
    if decoding:
        assert plan.features is not None
        S = torch.zeros(1, 2, plan.features.dimension, head_dim + 1)
        return compute.decode(plan, q[:, -1:].detach(), a[:, -1:].detach(), keys, S).detach()
    if two_passes:
        added, S = compute.state_pass(plan, keys, past=0)
        return compute.output_pass(plan, q, a, keys, S, added)
    return compute.attention(plan, q, a, keys, None, False)[0]


def plan_of(local, features, scale: float, offset: float, local_blocks: int, summaries: int | None = None) -> Plan:
    return Plan(
        local=local,
        features=features,
        scale=scale,
        offset=offset,
        block_size=BLOCK,
        local_blocks=local_blocks,
        summaries=summaries,
    )


def squared(tensor, head_dim, size, local_blocks):
    """Return plan, q, a and keys, as `Compute` takes them."""
    plan = plan_of(Power(4, 1.0), QuadraticFeatures(size, (0, 0, 1)), head_dim**-0.5 / 4, 1e-6, local_blocks)
    return plan, tensor(head_dim), tensor(size), {"k": tensor(head_dim), "v": tensor(head_dim), "b": tensor(size)}


def fastmax(tensor, head_dim, size, local_blocks):
    coefficients, a = (1, 1, 0.5), tensor(size)
    plan = plan_of(Quadratic(*coefficients), QuadraticFeatures(size, coefficients), 1.0, 0.0, local_blocks)
    return plan, a, a, {"v": tensor(head_dim), "b": tensor(size)}


def feature(tensor, head_dim, size, local_blocks):
    phi = tensor(size)
    plan = plan_of(Linear(), Explicit(size), 1.0, 0.0, local_blocks)
    return plan, phi, phi, {"v": tensor(head_dim), "b": tensor(size)}


def flurka(tensor, head_dim, size, _):
    rows = TOKENS // BLOCK * SUMMARIES
    keys = {
        "k": tensor(head_dim),
        "v": tensor(head_dim),
        "b": tensor(size, rows=rows),
        "far_v": tensor(head_dim, rows=rows),
        "mass": tensor(rows=rows),
    }
    plan = plan_of(Exponential(), Explicit(size), head_dim**-0.5, 0.0, 2, SUMMARIES)
    return plan, tensor(head_dim), tensor(size), keys


PLANS: dict[str, Callable[..., tuple[Plan, Tensor, Tensor, dict[str, Tensor]]]] = {
    "squared": squared,
    "fastmax": fastmax,
    "feature": feature,
    "flurka": flurka,
}


def sparse(tensor, head_dim: int, tokens: int, kept: bool = True, hashed: bool = False) -> Tensor:
    t = torch.arange(tokens)
    keep = torch.ones(1, tokens, 2, dtype=torch.bool) if kept else None
    bucket = torch.ones(1, tokens, 2, dtype=torch.int32) if hashed else None
    visible = VisibleRange(
        q_keep=keep, k_keep=keep, q_bucket=bucket, k_bucket=bucket, window_start=torch.zeros_like(t), window_end=t
    )
    return in_intervals.sparse_attention(tensor(head_dim), tensor(head_dim), tensor(head_dim), [visible], 1.0)


def heads(
    tensor, head_dim: int, tokens: int, keep_plain: bool = False, key_shift: bool = False, streamed: bool = False
) -> Tensor:
    """Norm and rotate heads that are a slice of a wider tensor, as the projection of a layer gives them; `streamed`: a
    piece of packed documents, whose key shift sees the row before the piece."""
    weight, bias = tensor(head_dim)[0, 0]
    table = torch.zeros(tokens, 1, head_dim // 2)
    x = torch.cat((tensor(head_dim), tensor(head_dim)), dim=2)[:, :, :2]
    shift = tensor(head_dim, rows=1)[0, 0] if key_shift else None
    before, starts = (tensor(head_dim, rows=1), torch.zeros(tokens, dtype=torch.bool)) if streamed else (None, None)
    rotated, plain = norm_rotary(x, weight, bias, table, table, shift, before, starts, 1e-5, keep_plain)
    return rotated if plain is None else rotated + plain


def sketch(tensor, head_dim: int, tokens: int, size: int) -> Tensor:
    up, down = tensor(2 * size, rows=head_dim)[0], tensor(size, rows=2 * size)[0]
    return learned_sketch(tensor(head_dim), *(x.transpose(0, 1).contiguous() for x in (up, down)))


def mapped(tensor, head_dim: int, tokens: int, map: str, size: int | None = None) -> Tensor:
    """Apply a feature map of the registry; its matrices have `size` columns, or as many as they have by default."""
    entry = FEATURE_MAPS[map]
    shapes = matrix_shapes(entry.matrices, 2, head_dim, size or entry.expansion * head_dim, head_dim // 4)
    matrices = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=not entry.fixed) for shape in shapes.values()]
    with mock.patch.object(dispatch, "INTERPRETED", True):  # CPU tensors go to the kernels too
        return feature_map(map, tensor(head_dim), *matrices, backend="triton")


def summaries(tensor, head_dim: int, tokens: int, gated: bool = False) -> Tensor:
    """Pool blocks; return K̃, Ṽ and the mass in one row."""
    rows = -(-tokens // BLOCK) * BLOCK
    k, v, logits = (tensor(size, rows=rows).unflatten(1, (-1, BLOCK)) for size in (head_dim, head_dim, SUMMARIES))
    gamma = tensor(rows=rows).float().unflatten(1, (-1, BLOCK)) if gated else None
    pooled = pool_blocks(k, v, logits, torch.zeros(BLOCK, 1, SUMMARIES), gamma)
    return torch.cat([x.float().flatten() for x in pooled if x is not None])


def loss(tensor, head_dim: int, tokens: int, vocabulary: int) -> Tensor:
    """Return the loss of a head and, from the kernel without a gradient, those of its tokens."""
    hidden, weight = tensor(head_dim)[0, :, 0], torch.zeros(vocabulary, head_dim, dtype=torch.bfloat16)
    labels = torch.zeros(tokens, dtype=torch.int64)
    with mock.patch.object(dispatch, "INTERPRETED", True):
        losses = linear_token_losses(hidden, weight, labels, backend="triton")
        return losses + linear_cross_entropy(hidden, weight, labels, backend="triton")[0]


def gate(tensor, head_dim: int, tokens: int, activation: str = "gelu") -> Tensor:
    return gated_activation(tensor(2 * head_dim), activation)


def norm(tensor, head_dim: int, tokens: int, rms: bool = False, bias: bool = False, added: bool = True) -> Tensor:
    """Add and norm; return both results in one row."""
    weight, of_bias = tensor(head_dim)[0, 0]
    delta = tensor(head_dim) if added else None
    normed, total = add_norm(tensor(head_dim), delta, weight, of_bias if bias else None, rms, 1e-5)
    return torch.cat((normed, total))


OTHERS: dict[str, Callable[..., Tensor]] = {
    "sparse": sparse,
    "heads": heads,
    "sketch": sketch,
    "map": mapped,
    "summaries": summaries,
    "loss": loss,
    "gate": gate,
    "norm": norm,
}
