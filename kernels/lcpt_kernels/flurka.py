"""FLuRKA attention: exact weights in the local blocks, and before them feature attention to summaries of blocks."""

from __future__ import annotations

from torch import Tensor

from lcpt_kernels import dispatch, reference
from lcpt_kernels.arguments import (
    BACKENDS,
    check_backend,
    check_packed_summaries,
    check_pair,
    check_sizes,
    check_stream,
    finite_gate,
    require,
    whole_blocks,
)
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.between_ranks import Exchange
from lcpt_kernels.documents import each_document
from lcpt_kernels.local_weights import Exponential, Linear
from lcpt_kernels.plan import Plan
from lcpt_kernels.state import State
from lcpt_kernels.streaming import attend
from lcpt_kernels.symmetric_features import Explicit

LOCAL: dict[str, Exponential | Linear] = {"softmax": Exponential(), "linear": Linear()}


@under_autocast
def flurka_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_summary: Tensor,
    v_summary: Tensor,
    *,
    mass_summary: Tensor | None = None,
    local: str = "softmax",
    scale: float | None = None,
    gain: Tensor | None = None,
    offset: float = 0.0,
    summaries: int | None = None,
    block_size: int = 256,
    local_blocks: int = 2,
    log_gate: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    exchange: Exchange | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """Compute attention with exact weights in the last `local_blocks` blocks, and r summaries of each block before
    them.

    The weight of s at t is exp(scale · q·k), or scale · q·k, in the local blocks of `block_size` = c tokens. Before
    them, the weight of a summary is gain · (c/r) · phi_q·phi_summary. All weights have one denominator.

    Args:
        q: [B, T, H, D], k: [B, T, Hkv, D], v: [B, T, Hkv, Dv], phi_q: [B, T, H, m]. Floating point, any strides; H is a
            multiple of Hkv.
        phi_summary: [B, N·r, Hkv, m], v_summary: [B, N·r, Hkv, Dv], of the N whole blocks, block after block. Where a
            sequence is continued, N counts the blocks that these tokens complete; in packed documents, those of all.
        mass_summary: [B, N·r, Hkv], the weight of a summary in the denominator relative to that in the numerator, or
            None: 1. Under a gate a summary decays from the end of its block on; the decay within its block is in
            v_summary and mass_summary.
        local: "softmax", the weight exp(scale · q·k), or "linear", the weight scale · q·k.
        scale: a factor of q·k; None: D^−½ for "softmax", 1 for "linear".
        gain: [H], a factor of the summaries' weights, or None: 1.
        offset: a term of the denominator. 0/0 is 0.
        summaries: r; None: computed from the rows of phi_summary, for which packed documents on a GPU are waited for,
            and which packed documents on several ranks do not do.
            If given, there may be more rows than whole blocks have summaries; the last ones are then not used.
        block_size: tokens of a block, c.
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

    Source: FLuRKA (arXiv 2306.15799), made block-causal; mass as in Transformer-VQ (arXiv 2309.16354).

    Example:
        >>> import torch
        >>> from lcpt_kernels import flurka_attention
        >>> q, k, v, phi_q = (torch.randn(1, 12, 2, 8) for _ in range(4))
        >>> phi_summary, v_summary = torch.rand(1, 6, 2, 8), torch.randn(1, 6, 2, 8)  # 2 summaries of 3 blocks
        >>> o, _ = flurka_attention(q, k, v, phi_q.exp(), phi_summary, v_summary, block_size=4)
        >>> o.shape
        torch.Size([1, 12, 2, 8])
    """
    check_backend(backend, (*BACKENDS, "triton"))
    check_pair(q, k, v, ("q", "k"))
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
    require(local in LOCAL, f"local {local!r} is neither softmax nor linear")
    scale = (q.shape[3] ** -0.5 if local == "softmax" else 1.0) if scale is None else scale
    start = 0 if exchange is None else exchange.start
    require(
        exchange is None or cu_seqlens is None or summaries is not None,
        "packed documents on several ranks need summaries: a rank may complete no block",
    )
    r = summaries_of_block(phi_summary.shape[1], summaries, v.shape[1], block_size, cu_seqlens, initial_state, start)
    check_shapes(phi_q, phi_summary, v_summary, mass_summary, v)
    mass: float | Tensor = block_size / r
    if gain is not None:
        if phi_q.shape[2] == v.shape[2]:  # no heads are shared: r rows a block are fewer than c
            mass = mass * gain[:, None]
        else:
            phi_q = (phi_q * gain[:, None]).to(phi_q.dtype)
    phi_summary = (phi_summary * mass).to(phi_summary.dtype)
    plan = Plan(
        local=LOCAL[local],
        features=Explicit(phi_q.shape[3]),
        scale=scale,
        offset=offset,
        block_size=block_size,
        local_blocks=local_blocks,
        summaries=r,
    )

    if backend == "reference":

        def one(q, phi_q, **keys):
            per_head = dict(zip(keys, reference.per_query_head(q.shape[2], *keys.values()), strict=True))
            return reference.flurka_attention(
                q,
                phi_q,
                **per_head,
                local=local,
                scale=scale,
                offset=offset,
                block_size=block_size,
                local_blocks=local_blocks,
            )

        tokens = {"q": q, "k": k, "v": v, "phi_q": phi_q, "log_gate": log_gate}
        of_blocks = {"phi_summary": phi_summary, "v_summary": v_summary, "mass_summary": mass_summary}
        return each_document(one, cu_seqlens, tokens, of_blocks, block_size, r), None
    return attend(
        plan,
        q,
        phi_q,
        {"k": k, "v": v, "log_gate": log_gate, "b": phi_summary, "far_v": v_summary, "mass": mass_summary},
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        exchange=exchange,
        compute=dispatch.flurka(backend, q, phi_q, v),
    )


def check_shapes(phi_q, phi_summary, v_summary, mass_summary, v) -> None:
    check_sizes("phi_q", phi_q)
    batch, rows, heads = v.shape[0], phi_summary.shape[1], v.shape[2]
    for name, x, last in (("phi_summary", phi_summary, phi_q.shape[3]), ("v_summary", v_summary, v.shape[3])):
        if x.shape != (batch, rows, heads, last):
            raise ValueError(f"{name} is {tuple(x.shape)}, it must be {(batch, rows, heads, last)}")
    if mass_summary is not None and mass_summary.shape != (batch, rows, heads):
        raise ValueError(f"mass_summary is {tuple(mass_summary.shape)}, not {(batch, rows, heads)}")


def summaries_of_block(rows, summaries, tokens, block_size, cu_seqlens, initial_state, start) -> int:
    """Return r, or 1 where there is no whole block. `rows` are those of phi_summary, `start` the tokens on the ranks
    before."""
    held = start if initial_state is None else initial_state.tail["v"].shape[1]
    if cu_seqlens is None:
        blocks = (held % block_size + tokens) // block_size
    else:
        if summaries is not None:
            check_packed_summaries("phi_summary", rows, summaries, block_size, cu_seqlens, held)
            return summaries
        blocks = int(whole_blocks(cu_seqlens, held, block_size))
    # Messages are formatted only if a check fails: `arguments.py`.
    if summaries is not None:
        require(summaries > 0, f"summaries {summaries} is not positive")
        if rows != blocks * summaries:
            raise ValueError(
                f"phi_summary has {rows} rows; {summaries} summaries of each of {blocks} whole blocks of "
                f"{block_size} tokens are {blocks * summaries}"
            )
        r = summaries
    else:
        if rows % blocks if blocks else rows:
            raise ValueError(
                f"phi_summary has {rows} rows, which is no multiple of {blocks} whole blocks of {block_size} tokens"
            )
        r = rows // blocks if blocks else 1
    held_blocks = 0 if initial_state is None else initial_state.tail["v"].shape[1] // block_size
    if held_blocks:
        before = initial_state.tail["b"].shape[1] // held_blocks
        require(not blocks or before == r, f"initial_state has {before} summaries a block, phi_summary has {r}")
        r = before or 1
    if r == 0:
        raise ValueError(f"phi_summary has no rows; {blocks} whole blocks of {block_size} tokens have one each or more")
    return r
