"""The backend "triton": `Compute` in the kernels of this folder. The two passes of an exchange run in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.chunked import Exponential, Linear, Plan, Power
from lcpt_kernels.derivatives import refuse_transforms
from lcpt_kernels.in_pytorch import output_pass, state_pass
from lcpt_kernels.triton.block_causal.autograd import NAME, Call, flatten
from lcpt_kernels.triton.block_causal.local_weights import LocalWeight

__all__ = ["attention", "output_pass", "state_pass"]


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
    refuse_transforms(NAME, "reference")
    k, features = keys.get("k"), plan.features
    assert features is not None
    local_weight, degree, shift = local_weight_of(plan, k)
    call = Call(
        q=None if k is None else q,
        k=k,
        v=keys["v"],
        a=a,
        b=keys["b"],
        state_v=keys.get("far_v"),
        mass=keys.get("mass"),
        log_gate=keys.get("log_gate"),
        initial=initial,
        cu_seqlens=cu_seqlens,
        summaries=plan.summaries or 0,
        local_weight=local_weight.value,
        degree=degree,
        coefficients=[features.c0, features.c1, features.c2],
        scale=plan.scale,
        shift=shift,
        offset=plan.offset,
        block_size=plan.block_size,
        local_blocks=plan.local_blocks,
        final=final,
    )
    o, *_, end = torch.ops.lcpt_kernels.block_causal_attention(*flatten(call))
    return o, end if final else None


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
