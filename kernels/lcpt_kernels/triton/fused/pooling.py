"""Pooling of blocks as a PyTorch operator, which torch.compile calls as it is.

forward   pooling_forward    K̃, Ṽ and the mass, each summary weighted by a softmax over the tokens of its block
backward  pooling_backward   recomputes P from the logits; one kernel for all gradients
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.triton.common.tensors import on_device_of, with_contiguous_rows
from lcpt_kernels.triton.fused.pooling_backward import pooling_backward
from lcpt_kernels.triton.fused.pooling_forward import Blocks, Pooled, pooling_forward

NAME = "the kernel of pool_blocks"  # in errors


def pool_blocks(
    k: Tensor, v: Tensor, logits: Tensor, segments: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pool as `lcpt_kernels.pooling` does: logits [B, N, c, Hkv, r], all fp32, bf16 or fp16; sums are fp32."""
    refuse_transforms(NAME, "torch")
    *pooled, mass, _ = torch.ops.lcpt_kernels.pool_blocks(k, v, logits, segments, gamma)
    return *pooled, None if gamma is None else mass


ARGUMENTS = "Tensor k, Tensor v, Tensor logits, Tensor segments, Tensor? gamma"


@torch.library.custom_op(
    "lcpt_kernels::pool_blocks",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor k_pooled, Tensor v_pooled, Tensor mass, Tensor lse)",
)
def forward(*arguments):
    """Return K̃, Ṽ, the mass (empty without gamma), and lse [B, N·r, Hkv] fp32 of logits + segments over a block."""
    with on_device_of(arguments[0]):
        pooled, lse = pooling_forward(Blocks.from_operator(*arguments))
    return pooled.k, pooled.v, lse.new_empty(0) if pooled.mass is None else pooled.mass, lse


@forward.register_fake
def _(k, v, logits, segments, gamma):
    batch, blocks, _, heads, summaries = logits.shape
    lse = k.new_empty(batch, blocks * summaries, heads, dtype=torch.float32)
    k_pooled, v_pooled = (x.new_empty(*lse.shape, x.shape[4]) for x in (k, v))
    return k_pooled, v_pooled, lse.new_empty(0 if gamma is None else lse.shape), lse


@torch.library.custom_op(
    "lcpt_kernels::pool_blocks_backward",
    mutates_args=(),
    schema=f"(Tensor dk_pooled, Tensor dv_pooled, Tensor? d_mass, Tensor lse, {ARGUMENTS}) -> Tensor[]",
)
def backward(dk_pooled, dv_pooled, d_mass, lse, *arguments):
    """Return the gradients of k, v and logits, and with gamma that of gamma."""
    with on_device_of(lse):
        d = Pooled(
            with_contiguous_rows(dk_pooled),
            with_contiguous_rows(dv_pooled),
            None if d_mass is None else d_mass.contiguous(),
        )
        gradients = pooling_backward(Blocks.from_operator(*arguments), lse, d)
    return [x for x in gradients if x is not None]


@backward.register_fake
def _(dk_pooled, dv_pooled, d_mass, lse, k, v, logits, segments, gamma):
    return [x.new_empty(x.shape) for x in (k, v, logits, gamma) if x is not None]


def save(ctx, inputs, output):
    ctx.save_for_backward(output[-1], *inputs)


def differentiate(ctx, dk_pooled, dv_pooled, d_mass, _):
    lse, *given = ctx.saved_tensors
    gated = given[-1] is not None
    dk, dv, d_logits, *d_gamma = torch.ops.lcpt_kernels.pool_blocks_backward(
        dk_pooled, dv_pooled, d_mass if gated else None, lse, *given
    )
    return dk, dv, d_logits, None, d_gamma[0] if gated else None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "torch"))
