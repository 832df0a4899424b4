"""Collectives that autograd and torch.compile know: operators that take the name of a process group.

Backward is the transposed collective. Sums over ranks are in fp32, in the order of ranks, so they are the same on each.
A graph keeps them all, in their order: what one rank has no use for, others wait for.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.distributed.distributed_c10d import _resolve_process_group


def all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """Return the tensors of all ranks of a group, [ranks, *x.shape]; x has one shape on all of them."""
    return torch.ops.lcpt.all_gather(x, ranks, group)


def all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """Send sent[i] rows of x to rank i of a group, in order; return the received[i] rows from each rank i, in order."""
    return torch.ops.lcpt.all_to_all(x, sent, received, group)


def _process_group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]  # newer PyTorch has a type for such a name


@torch.library.custom_op("lcpt::all_gather", mutates_args=())
def _all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    gathered = x.new_empty((ranks, *x.shape))
    dist.all_gather_into_tensor(gathered, x.contiguous()[None], group=_process_group(group))
    return gathered


@_all_gather.register_fake
def _(x, ranks, group):
    return x.new_empty((ranks, *x.shape))


@torch.library.custom_op("lcpt::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    rows = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(rows, x.contiguous(), received, sent, group=_process_group(group))
    return rows


@_all_to_all.register_fake
def _(x, sent, received, group):
    return x.new_empty((sum(received), *x.shape[1:]))


def _keep_group(ctx, inputs, output):
    ctx.ranks, ctx.group = inputs[1:]


def _sum_over_ranks(ctx, d_gathered):
    """Bring each rank what all have of its gradient."""
    ones = [1] * ctx.ranks
    parts = all_to_all(d_gathered, ones, ones, ctx.group)
    wide = torch.promote_types(parts.dtype, torch.float32)
    return parts.sum(0, dtype=wide).to(parts.dtype), None, None


def _keep_counts(ctx, inputs, output):
    ctx.sent, ctx.received, ctx.group = inputs[1:]


def _send_back(ctx, d_rows):
    return all_to_all(d_rows, ctx.received, ctx.sent, ctx.group), None, None, None


_all_gather.register_autograd(_sum_over_ranks, setup_context=_keep_group)
_all_to_all.register_autograd(_send_back, setup_context=_keep_counts)
for operator in (torch.ops.lcpt.all_gather.default, torch.ops.lcpt.all_to_all.default):
    _register_effectful_op(operator, _EffectType.ORDERED)
