"""The backend "torch": `Compute` in PyTorch, head by head and document by document."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lcpt_kernels import chunked_state
from lcpt_kernels.chunked import block_causal_attention
from lcpt_kernels.decode import decode as decode  # of `Compute`
from lcpt_kernels.documents import each_document
from lcpt_kernels.plan import Plan
from lcpt_kernels.reference import per_query_head
from lcpt_kernels.state import of_summaries
from lcpt_kernels.state_input import StateInput


def attention(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: dict[str, Tensor],
    initial: Tensor | None,
    final: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention at once, as `Compute.attention`."""
    if cu_seqlens is not None:
        summaries = of_summaries(plan)
        tokens = {"q": q, "a": a} | {name: x for name, x in keys.items() if name not in summaries}
        of_blocks = {name: x for name, x in keys.items() if name in summaries}

        def one(q: Tensor, a: Tensor, **keys: Tensor) -> Tensor:
            return attention(plan, q, a, keys, None, False)[0]

        return each_document(one, cu_seqlens, tokens, of_blocks, plan.block_size, plan.summaries or 0), None
    o, S = _block_causal(plan, q, a, keys, initial, final, None)
    group = q.shape[2] // keys["v"].shape[2]
    return o, None if S is None else S[:, ::group].contiguous()


def state_pass(plan: Plan, keys: dict[str, Tensor], past: int) -> tuple[Sequence[Tensor], Tensor]:
    """Compute the state, as `Compute.state_pass`: once for each key-value head."""
    added, S = chunked_state.state_pass(keys["v"], _state_input(keys), plan, past, keys.get("log_gate"))
    return (added,), S


def output_pass(
    plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], initial: Tensor | None, added: Sequence[Tensor]
) -> Tensor:
    """Compute the output, as `Compute.output_pass`."""
    return _block_causal(plan, q, a, keys, initial, False, added[0])[0]


def _block_causal(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: dict[str, Tensor],
    initial: Tensor | None,
    final: bool,
    added: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    heads = q.shape[2]
    per_head = dict(zip(keys, per_query_head(heads, *keys.values()), strict=True))
    if initial is not None:
        initial = initial.repeat_interleave(heads // initial.shape[1], dim=1)
    if added is not None and added.shape[2] != heads:
        added = added.repeat_interleave(heads // added.shape[2], dim=2)
    return block_causal_attention(
        q,
        per_head.get("k", per_head["b"]),
        per_head["v"],
        a,
        _state_input(per_head),
        plan,
        per_head.get("log_gate"),
        initial,
        final,
        added,
    )


def _state_input(keys: dict[str, Tensor]) -> StateInput:
    return StateInput(keys["b"], keys.get("far_v", keys["v"]), keys.get("mass"))
