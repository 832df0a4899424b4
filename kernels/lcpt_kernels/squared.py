"""Squared attention: the linear-cost family that polysketch, exact degree two and Fastmax share."""

from __future__ import annotations

from torch import Tensor

from lcpt_kernels import reference
from lcpt_kernels.arguments import check_backend, check_degree, check_pair, require
from lcpt_kernels.chunked import Plan, Power, Quadratic, block_causal_attention
from lcpt_kernels.features import QuadraticFeatures


def squared_attention(
    a: Tensor, b: Tensor, v: Tensor, *, q: Tensor | None = None, k: Tensor | None = None, degree: int = 4,
    scale: float = 1.0, offset: float | None = None, coefficients: tuple[float, float, float] = (0, 0, 1),
    block_size: int = 256, local_blocks: int = 1, backend: str = "auto",
) -> tuple[Tensor, None]:
    """Block-causal attention whose earlier blocks weigh c₀ + c₁ s + c₂ s² with s = a_t·b_s, at linear cost.

    a [B, T, H, r]; b [B, T, Hkv, r]; v [B, T, Hkv, Dv]; H a multiple of Hkv; floating point, strides free.
    q [B, T, H, D] and k [B, T, Hkv, D], given together, make the weights inside the last `local_blocks` blocks of
    `block_size` tokens (scale · q·k)^degree; without them those weigh as the earlier ones do.
    offset stands in the denominator; None: scale^degree with q and k, else 0. 0/0 is 0.
    backend: "reference" (quadratic, the definition), "torch" (linear), or "auto".
    Returns (o [B, T, H, Dv] in the queries' dtype, None). Accumulates in fp32, in float64 for float64 inputs.
    ValueError names a shape or a number that does not fit.
    Source: PolySketchFormer (arXiv 2310.01655), block-lower-triangular multiplication with exact local blocks.
    """
    check_backend(backend)
    check_pair(a, b, v, "ab")
    require((q is None) == (k is None), "q and k are given together or not at all")
    require(block_size > 0, f"block_size {block_size} is not positive")
    require(local_blocks in (1, 2), f"local_blocks {local_blocks} is neither 1 nor 2")
    if q is not None:
        check_pair(q, k, v, "qk")
        check_degree(degree)
        require(q.shape[2] == a.shape[2], f"q has {q.shape[2]} heads, a has {a.shape[2]}")
    if offset is None:
        offset = 0.0 if q is None else scale**degree

    b, k, v = (x if x is None else x.repeat_interleave(a.shape[2] // x.shape[2], dim=2) for x in (b, k, v))
    if backend == "reference":
        o = reference.squared_attention(a, b, v, q, k, degree, scale, offset, coefficients, block_size, local_blocks)
        return o, None
    features = QuadraticFeatures(a.shape[-1], coefficients)
    if q is None:
        plan = Plan(Quadratic(*coefficients), features, 1.0, offset, block_size, local_blocks)
        return block_causal_attention(a, b, v, a, b, plan), None
    plan = Plan(Power(degree), features, scale, offset, block_size, local_blocks)
    return block_causal_attention(q, k, v, a, b, plan), None
