"""Decoding: the output of one token from the state and the local keys, of which it is the last. Notation: `chunked.py`.

    o = ([0, offset] + Σ_{s local} e^{G_t − G_s} w(scale·q·k_s) v̄_s + e^{G_t − G_B} φ(a)ᵀ S), its first Dv over its last

Each of S and the local keys is read once, in place: query heads that share them are the rows of one product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcpt_kernels.accumulation import accumulated, columns_of, rows_of, with_ones
from lcpt_kernels.chunked import add_state, heads_first
from lcpt_kernels.decay import Decay
from lcpt_kernels.derivatives import refuse_transforms
from lcpt_kernels.plan import Block, Plan
from lcpt_kernels.state import State


def is_decoding(plan: Plan, q: Tensor, a: Tensor, keys: Mapping[str, Tensor], before: State) -> bool:
    """Return whether the call continues `before` by one token after which no block leaves for the state, and nothing
    needs a gradient. The token at which one leaves, of c, is read as any other piece. Raise ValueError inside a
    transform of torch.func."""
    if q.shape[1] != 1 or before.tail["v"].shape[1] + 1 >= plan.block_size * plan.local_blocks:
        return False
    if torch.compiler.is_compiling() or any(x.dtype != before.tail[name].dtype for name, x in keys.items()):
        return False
    tensors = (q, a, before.S, *keys.values(), *before.tail.values())
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    refuse_transforms("block-causal attention", "reference")
    return True


def decode(plan: Plan, q: Tensor, a: Tensor, keys: Mapping[str, Tensor], S: Tensor) -> Tensor:
    """Return o [B, 1, H, Dv] in q's dtype.

    Args:
        q: [B, 1, H, D], a: [B, 1, H, r].
        keys: as in `Compute`, those of the token's local blocks, itself the last.
        S: [B, Hkv, F, Dv + 1], the state before these blocks.
    """
    assert plan.features is not None
    k, v, log_gate = heads_first(keys.get("k", keys["b"]), keys["v"], keys.get("log_gate"))
    assert k is not None and v is not None
    tokens = k.shape[2]
    block, decay = Block.all(plan, tokens - 1, tokens, to_the_end=False)[0], Decay(log_gate)
    q_rows, a_rows = (x[:, 0].unflatten(1, (k.shape[1], -1)) for x in (q, a))  # [B, Hkv, group, ·]
    every = slice(None)

    s = plan.scale * accumulated(q_rows) @ rows_of(k, block.local).mT  # [B, Hkv, group, keys]
    w, m_i = plan.local.weights(s, block.diagonal, decay.tile_log_decay(block))
    acc = w @ with_ones(v, block.local)  # [B, Hkv, group, Dv + 1]
    state_terms = decay.scale_by_cumsum(block, plan.features.query(columns_of(a_rows, every)).mT @ accumulated(S))
    acc, l_i, _ = add_state(acc, m_i, state_terms, plan.offset)
    return (acc[..., :-1] / l_i).flatten(1, 2)[:, None].to(q.dtype)
