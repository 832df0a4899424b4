"""The backend "triton": `Compute` in the kernels of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcpt_kernels.derivatives import refuse_transforms
from lcpt_kernels.local_weights import Exponential, Linear, Power
from lcpt_kernels.plan import Plan
from lcpt_kernels.triton.block_causal.autograd import NAME, Call, flatten
from lcpt_kernels.triton.block_causal.decode import decode_token
from lcpt_kernels.triton.block_causal.local_weights import LocalWeight
from lcpt_kernels.triton.block_causal.state_autograd import call_of  # noqa: F401  defines the operator


def attention(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: dict[str, Tensor],
    initial: Tensor | None,
    final: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return o [B, T, H, Dv] in q's dtype, and with `final` the state [B, Hkv, F, Dv + 1] fp32 after the last token.

    Args:
        q: [B, T, H, D], a: [B, T, H, r], of the last T of the keys' P + T tokens; fp32, bf16 or fp16.
        keys: "v" [B, P + T, Hkv, Dv]; "b" [B, P + T, Hkv, r]; "k" [B, P + T, Hkv, D], without it q is a and k is b;
            "log_gate" [B, P + T, Hkv] ≤ 0, optional. The first P tokens start a block. With plan.summaries "b",
            "far_v" [B, S, Hkv, Dv] and the optional "mass" [B, S, Hkv] are those of summaries of whole blocks.
        initial: [B, Hkv, F, Dv + 1] fp32, the state before the keys, with the features of `chunked.py`.
        cu_seqlens: [N + 1], for B = 1.

    Products accumulate in fp32. In 16 bits, weights and features are bf16: fp16 has too small a range for them.
    """
    o, *_, end = torch.ops.lcpt_kernels.block_causal_attention(
        *flatten(_call(plan, q, a, keys, initial, final, cu_seqlens))
    )
    return o, end if final else None


def decode(plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], S: Tensor) -> Tensor:
    """Return o [B, 1, H, Dv] of one token, the last of `keys`, which are all those of its local blocks; S [B, Hkv, F,
    Dv + 1] is before them."""
    k, v, features = keys.get("k"), keys["v"], plan.features
    assert features is not None
    local_weight, degree, shift = local_weight_of(plan, k)
    return decode_token(
        a if k is None else q,
        keys["b"] if k is None else k,
        v,
        a,
        keys.get("log_gate"),
        S,
        features,
        local_weight=local_weight,
        degree=degree,
        scale=plan.scale,
        shift=shift,
        offset=plan.offset,
        first=(v.shape[1] - 1) // plan.block_size * plan.block_size,
    )


def state_pass(plan: Plan, keys: dict[str, Tensor], past: int) -> tuple[Sequence[Tensor], Tensor]:
    """Return what stands for the blocks' additions to the state, and S [B, Hkv, F, Dv + 1] fp32 after the keys, of
    which the first `past` have no queries."""
    refuse_transforms(NAME, "reference")
    features = plan.features
    assert features is not None
    *added, S = torch.ops.lcpt_kernels.block_causal_state(
        keys["v"],
        keys["b"],
        keys.get("far_v"),
        keys.get("mass"),
        keys.get("log_gate"),
        past,
        plan.summaries or 0,
        [features.c0, features.c1, features.c2],
        plan.block_size,
        plan.local_blocks,
    )
    return added, S


def output_pass(
    plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], initial: Tensor | None, added: Sequence[Tensor]
) -> Tensor:
    """Return o, from what `state_pass` returned."""
    return torch.ops.lcpt_kernels.block_causal_attention(
        *flatten(_call(plan, q, a, keys, initial, False, None, added))
    )[0]


def _call(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: dict[str, Tensor],
    initial: Tensor | None,
    final: bool,
    cu_seqlens: Tensor | None,
    added: Sequence[Tensor] | None = None,
) -> Call:
    refuse_transforms(NAME, "reference")
    k, features = keys.get("k"), plan.features
    assert features is not None
    local_weight, degree, shift = local_weight_of(plan, k)
    scale = plan.scale
    if local_weight == LocalWeight.EXPONENTIAL:  # whose kernels want a scale above 0
        q, scale = (-q if scale < 0 else q), max(abs(scale), 1e-30)
    value_added, denom_added = (None, None) if added is None else added
    return Call(
        q=None if k is None else q,
        k=k,
        v=keys["v"],
        a=a,
        b=keys["b"],
        state_v=keys.get("far_v"),
        mass=keys.get("mass"),
        log_gate=keys.get("log_gate"),
        initial=initial,
        value_added=value_added,
        denom_added=denom_added,
        cu_seqlens=cu_seqlens,
        summaries=plan.summaries or 0,
        local_weight=local_weight.value,
        degree=degree,
        coefficients=[features.c0, features.c1, features.c2],
        scale=scale,
        shift=shift,
        offset=plan.offset,
        block_size=plan.block_size,
        local_blocks=plan.local_blocks,
        final=final,
        two_passes=added is not None,
    )


def local_weight_of(plan: Plan, k: Tensor | None) -> tuple[LocalWeight, int, float]:
    """Return the local weight, its degree and its shift, which are 0 for all but POWER."""
    if k is None:  # q is a and k is b: the local weight is that of the state
        return LocalWeight.QUADRATIC, 0, 0.0
    if isinstance(plan.local, Exponential):
        return LocalWeight.EXPONENTIAL, 0, 0.0
    if isinstance(plan.local, Linear):
        return LocalWeight.LINEAR, 0, 0.0
    assert isinstance(plan.local, Power)
    return LocalWeight.POWER, plan.local.degree, plan.local.shift
