"""Feature attention: weights φ(q)·φ(k) of given features, in the local blocks and before them."""

from __future__ import annotations

from torch import Tensor

from lcpt_kernels import dispatch, reference
from lcpt_kernels.arguments import BACKENDS, check_backend, check_pair, check_stream, finite_gate
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.between_ranks import Exchange
from lcpt_kernels.documents import each_document
from lcpt_kernels.local_weights import Linear
from lcpt_kernels.plan import Plan
from lcpt_kernels.state import State
from lcpt_kernels.streaming import attend
from lcpt_kernels.symmetric_features import Explicit


@under_autocast
def feature_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    offset: float = 0.0,
    block_size: int = 256,
    local_blocks: int = 1,
    log_gate: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    exchange: Exchange | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """Compute o_t = Σ_{s ≤ t} (φ(q_t)·φ(k_s)) v_s / (offset + Σ_{s ≤ t} φ(q_t)·φ(k_s)), at linear cost.

    Args:
        phi_q: [B, T, H, m], phi_k: [B, T, Hkv, m], v: [B, T, Hkv, Dv]: features of queries and keys, and values.
            Floating point, any strides, one dtype; H is a multiple of Hkv. Features should be ≥ 0, or the denominator
            may be 0.
        offset: a term of the denominator. 0/0 is 0.
        block_size, local_blocks: as in `squared_attention`; here they change only the order of the sums.
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

    Source: Transformers are RNNs (arXiv 2006.16236).

    Example:
        >>> import torch
        >>> from lcpt_kernels import feature_attention
        >>> phi_q, phi_k = torch.ones(1, 4, 2, 8), torch.ones(1, 4, 1, 8)
        >>> v = torch.arange(4.0).view(1, 4, 1, 1)
        >>> o, _ = feature_attention(phi_q, phi_k, v, block_size=2)
        >>> o[0, :, 0, 0]  # all weights are equal: means of the values so far
        tensor([0.0000, 0.5000, 1.0000, 1.5000])
    """
    check_backend(backend, (*BACKENDS, "triton"))
    check_pair(phi_q, phi_k, v, ("phi_q", "phi_k"))
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
    plan = Plan(
        local=Linear(),
        features=Explicit(phi_q.shape[-1]),
        scale=1.0,
        offset=offset,
        block_size=block_size,
        local_blocks=local_blocks,
    )

    if backend == "reference":

        def one(phi_q, phi_k, v, log_gate):
            phi_k, v, log_gate = reference.per_query_head(phi_q.shape[2], phi_k, v, log_gate)
            return reference.feature_attention(phi_q, phi_k, v, log_gate, offset)

        return each_document(one, cu_seqlens, {"phi_q": phi_q, "phi_k": phi_k, "v": v, "log_gate": log_gate}), None
    return attend(
        plan,
        phi_q,
        phi_q,
        {"b": phi_k, "v": v, "log_gate": log_gate},
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        exchange=exchange,
        compute=dispatch.feature(backend, phi_q, v),
    )
