"""Squared attention: the linear-cost family that polysketch, exact degree two and Fastmax share."""

from __future__ import annotations

from torch import Tensor

from lcpt_kernels import dispatch, reference
from lcpt_kernels.arguments import BACKENDS, check_backend, check_degree, check_pair, check_stream, finite_gate, require
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.chunked import Plan, Power, Quadratic
from lcpt_kernels.streaming import Exchange, State, attend, each_document
from lcpt_kernels.symmetric_features import QuadraticFeatures


@under_autocast
def squared_attention(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    *,
    q: Tensor | None = None,
    k: Tensor | None = None,
    degree: int = 4,
    scale: float = 1.0,
    offset: float | None = None,
    coefficients: tuple[float, float, float] = (0, 0, 1),
    block_size: int = 256,
    local_blocks: int = 1,
    log_gate: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    exchange: Exchange | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """Block-causal attention whose earlier blocks weigh c₀ + c₁ s + c₂ s² with s = a_t·b_s, at linear cost.

    a [B, T, H, r]; b [B, T, Hkv, r]; v [B, T, Hkv, Dv]; H a multiple of Hkv; floating point, strides free.
    q [B, T, H, D] and k [B, T, Hkv, D], given together, make the weights inside the last `local_blocks` blocks of
    `block_size` tokens (scale · q·k)^degree; without them those weigh as the earlier ones do.
    offset stands in the denominator; None: scale^degree with q and k, else 0. 0/0 is 0.
    log_gate [B, T, Hkv], ≤ 0: the weight of s at t decays by e to the sum of the gates s + 1 … t; −∞ forgets all that
    is before its token.
    initial_state, output_final_state: f(x[:n]) and then f(x[n:], initial_state) equal f(x), for any n; differentiable.
    cu_seqlens [N + 1]: packed documents, B = 1, each as if alone.
    exchange: where ranks share a sequence, what they tell each other between state and output.
    backend: "reference" (quadratic, the definition), "torch" (linear), "triton" (linear, for a GPU), or "auto".
    Returns (o [B, T, H, Dv] in the queries' dtype, the final state or None). Accumulates in fp32, in float64 for
    float64 inputs. ValueError names a shape or a number that does not fit.
    Source: PolySketchFormer (arXiv 2310.01655), block-lower-triangular multiplication with exact local blocks.
    """
    check_backend(backend, (*BACKENDS, "triton"))
    check_pair(a, b, v, "ab")
    require((q is None) == (k is None), "q and k are given together or not at all")
    piece = check_stream(
        v, log_gate, block_size, local_blocks, initial_state, output_final_state, cu_seqlens, exchange, backend
    )
    log_gate = finite_gate(log_gate, backend)
    if q is not None:
        check_pair(q, k, v, "qk")
        check_degree(degree)
        require(q.shape[2] == a.shape[2], f"q has {q.shape[2]} heads, a has {a.shape[2]}")
    if offset is None:
        offset = 0.0 if q is None else scale**degree
    local, local_scale = (Quadratic(*coefficients), 1.0) if q is None else (Power(degree), scale)
    plan = Plan(
        local=local,
        features=QuadraticFeatures(a.shape[-1], coefficients),
        scale=local_scale,
        offset=offset,
        block_size=block_size,
        local_blocks=local_blocks,
    )

    keys = {"b": b, "v": v, "k": k, "log_gate": log_gate}
    compute = dispatch.squared(backend, a, v, q)
    if compute is not None and not piece:
        present = {name: x for name, x in keys.items() if x is not None}
        return compute(plan, a if q is None else q, a, present, None, False, cu_seqlens)

    def one(a, b, v, q, k, log_gate):
        if backend == "reference":
            b, v, k, log_gate = reference.per_query_head(a.shape[2], b, v, k, log_gate)
            return reference.squared_attention(
                a, b, v, q, k, log_gate, degree, scale, offset, coefficients, block_size, local_blocks
            )
        return attend(plan, a if q is None else q, a, {"b": b, "v": v, "k": k, "log_gate": log_gate}, None, False)[0]

    if piece:
        return attend(plan, a if q is None else q, a, keys, initial_state, output_final_state, exchange, compute)
    return each_document(one, cu_seqlens, {"a": a, "b": b, "v": v, "q": q, "k": k, "log_gate": log_gate}), None
