"""Feature attention: weights φ(q)·φ(k) of features that are given, the same near and far."""

from __future__ import annotations

from torch import Tensor

from lcpt_kernels import dispatch, reference
from lcpt_kernels.arguments import BACKENDS, check_backend, check_pair, check_stream, finite_gate
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.chunked import Linear, Plan
from lcpt_kernels.streaming import Exchange, State, attend, each_document
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
    """o_t = Σ_{s ≤ t} (φ(q_t)·φ(k_s)) v_s / (offset + Σ_{s ≤ t} φ(q_t)·φ(k_s)), at linear cost.

    phi_q [B, T, H, m]; phi_k [B, T, Hkv, m]; v [B, T, Hkv, Dv]; H a multiple of Hkv; floating point, strides free.
    Features should not be negative: the denominator could be 0. 0/0 is 0. block_size and local_blocks change the
    order of the sums alone. The other arguments, the result and the errors are those of squared_attention.
    Source: Transformers are RNNs (arXiv 2006.16236).
    """
    check_backend(backend, (*BACKENDS, "triton"))
    check_pair(phi_q, phi_k, v, ("phi_q", "phi_k"))
    piece = check_stream(
        v, log_gate, block_size, local_blocks, initial_state, output_final_state, cu_seqlens, exchange, backend
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

    keys = {"b": phi_k, "v": v, "log_gate": log_gate}
    compute = dispatch.feature(backend, phi_q, v)
    if compute is not None and not piece:
        present = {name: x for name, x in keys.items() if x is not None}
        return compute(plan, phi_q, phi_q, present, None, False, cu_seqlens)

    def one(phi_q, phi_k, v, log_gate):
        if backend == "reference":
            phi_k, v, log_gate = reference.per_query_head(phi_q.shape[2], phi_k, v, log_gate)
            return reference.feature_attention(phi_q, phi_k, v, log_gate, offset)
        return attend(plan, phi_q, phi_q, {"b": phi_k, "v": v, "log_gate": log_gate}, None, False)[0]

    if piece:
        return attend(plan, phi_q, phi_q, keys, initial_state, output_final_state, exchange, compute)
    return each_document(one, cu_seqlens, {"phi_q": phi_q, "phi_k": phi_k, "v": v, "log_gate": log_gate}), None
