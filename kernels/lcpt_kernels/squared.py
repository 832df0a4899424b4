"""Squared attention: the family of linear cost that polysketch, exact degree two and Fastmax share."""

from __future__ import annotations

from torch import Tensor

from lcpt_kernels import dispatch, reference
from lcpt_kernels.arguments import BACKENDS, check_backend, check_pair, check_power, check_stream, finite_gate, require
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.between_ranks import Exchange
from lcpt_kernels.documents import each_document
from lcpt_kernels.local_weights import Power, Quadratic
from lcpt_kernels.plan import Plan
from lcpt_kernels.state import State
from lcpt_kernels.streaming import attend
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
    shift: float = 0.0,
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
    """Compute block-causal attention at linear cost; before the local blocks, weights are c₀ + c₁ s + c₂ s², s =
    a_t·b_s.

    Args:
        a: [B, T, H, r], b: [B, T, Hkv, r], v: [B, T, Hkv, Dv]: sketches of queries and keys, and values. Floating
            point, any strides, one dtype; H is a multiple of Hkv.
        q: [B, T, H, D], k: [B, T, Hkv, D], both or neither. With them, weights inside the last `local_blocks` blocks of
            `block_size` tokens are (scale · q·k + shift)^degree. Without them, all weights are those of a and b.
        degree: positive and even.
        scale: a factor of q·k.
        shift: a term inside the power. With it, weights grow with q·k from its sign on.
        offset: a term of the denominator; None: scale^degree with q and k, else 0. 0/0 is 0.
        coefficients: (c₀, c₁, c₂).
        block_size: tokens of a block.
        local_blocks: 1 or 2.
        log_gate: [B, T, Hkv], ≤ 0, or None: the weight of s at t decays by e to the sum of the gates s + 1 … t. −∞
            forgets everything before its token.
        initial_state: the state of a sequence that these tokens continue, from an earlier call, or None.
        output_final_state: whether to return the state after the last token. For any n, f(x[:n]) and then f(x[n:],
            state) equal f(x); gradients flow through the state.
        cu_seqlens: [N + 1], int32 or int64, or None: the borders of packed documents, each attended to on its own; B =
            1. The first document goes on from the state or the ranks before, the last one leaves the state. An empty
            first document (0, 0, …): the tokens begin with a document. With a state or an exchange the host reads it.
        exchange: an `Exchange` between ranks that share a sequence, or None.
        backend: "reference" (quadratic, the definition), "torch" (linear), "triton" (linear, for a GPU), or "auto".

    Returns:
        (o, state): o [B, T, H, Dv] in the queries' dtype, and the final `State`, or None. Sums are fp32, for float64
        inputs float64.

    Raises:
        ValueError: a shape, dtype or option that does not fit; the message names it.

    Source: PolySketchFormer (arXiv 2310.01655), block-lower-triangular multiplication with exact local blocks.

    Example:
        >>> import torch
        >>> from lcpt_kernels import squared_attention
        >>> a, b = torch.ones(1, 6, 2, 4), torch.ones(1, 6, 2, 4)
        >>> v = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 2, 3)
        >>> o, state = squared_attention(a, b, v, block_size=2, output_final_state=True)
        >>> o[0, :, 0, 0]  # all weights are equal: means of the values so far
        tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 2.5000])
        >>> state.S.shape  # [B, Hkv, features, Dv + 1]
        torch.Size([1, 2, 16, 4])
    """
    check_backend(backend, (*BACKENDS, "triton"))
    check_pair(a, b, v, ("a", "b"))
    require((q is None) == (k is None), "q and k are given together or not at all")
    check_stream(
        v,
        log_gate=log_gate,
        block_size=block_size,
        local_blocks=local_blocks,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        exchange=exchange,
        backend=backend,
    )
    log_gate = finite_gate(log_gate, backend)
    if q is not None and k is not None:
        check_pair(q, k, v, ("q", "k"))
        check_power(degree, shift)
        require(q.shape[2] == a.shape[2], f"q has {q.shape[2]} heads, a has {a.shape[2]}")
    if offset is None:
        offset = 0.0 if q is None else scale**degree
    local, local_scale = (Quadratic(*coefficients), 1.0) if q is None else (Power(degree, shift), scale)
    plan = Plan(
        local=local,
        features=QuadraticFeatures(a.shape[-1], coefficients),
        scale=local_scale,
        offset=offset,
        block_size=block_size,
        local_blocks=local_blocks,
    )

    if backend == "reference":

        def one(a, b, v, q, k, log_gate):
            b, v, k, log_gate = reference.per_query_head(a.shape[2], b, v, k, log_gate)
            return reference.squared_attention(
                a,
                b,
                v,
                q=q,
                k=k,
                log_gate=log_gate,
                degree=degree,
                scale=scale,
                shift=shift,
                offset=offset,
                coefficients=coefficients,
                block_size=block_size,
                local_blocks=local_blocks,
            )

        return each_document(one, cu_seqlens, {"a": a, "b": b, "v": v, "q": q, "k": k, "log_gate": log_gate}), None
    return attend(
        plan,
        a if q is None else q,
        a,
        {"b": b, "v": v, "k": k, "log_gate": log_gate},
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        exchange=exchange,
        compute=dispatch.squared(backend, a, v, q),
    )
