"""Cross-entropy of a linear head, without its logits [T, V] in memory: a chunk of tokens at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lcpt_kernels import dispatch
from lcpt_kernels.arguments import check_backend, require
from lcpt_kernels.autocast import under_autocast

# Logits that exist at one time. PyTorch keeps several fp32 tensors of them, the kernel only the logits themselves:
# 512 MiB in 16 bits, 1 GiB in fp32. Each further chunk reads the weight and adds to its gradient once more.
LOGITS = {"cpu": 2**20}  # what a core's cache holds
LOGITS_ELSEWHERE = 2**26  # what fills a GPU
LOGITS_IN_TRITON = 2**28
ALIGNED = 16  # the kernel's rows are multiples of so many logits, for loads of 16 bytes


@under_autocast
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of softmax(hidden · weightᵀ), and its gradients in the same pass.

    d_logits = softmax(logits) − onehot(label),  dhidden = d_logits · weight,  dweight = d_logitsᵀ · hidden.
    The backward pass only scales these. Where no gradient is asked for, none is computed. The z-loss,
    z_loss · Σ logsumexp(logits)², keeps logits small (PaLM, arXiv 2204.02311): it has a gradient only, the result is
    without it.

    Args:
        hidden: [..., d], floating point, any strides.
        weight: [V, d] in hidden's dtype.
        labels: [...], int32 or int64, negative where nothing is to be predicted: such a token has loss and gradient 0.
            The kernel does not look at its logits. A label ≥ V makes the kernel's loss NaN.
        z_loss: the coefficient of the z-loss, ≥ 0.
        backend: "torch", "triton" (for a GPU) or "auto".

    Returns:
        (sum of −log p[label] in nats, fp32; count of labels ≥ 0, int64), on the device: the host waits for nothing.

    Raises:
        ValueError: names a size, dtype or coefficient that does not fit.

    Example:
        >>> loss, count = linear_cross_entropy(torch.ones(3, 2), torch.zeros(4, 2), torch.tensor([0, 3, -1]))
        >>> loss, count  # 2 log 4
        (tensor(2.7726), tensor(2))
    """
    require(0 <= z_loss < math.inf, f"z_loss is {z_loss}; it must be ≥ 0 and finite")
    in_triton = _check(hidden, weight, labels, backend)
    rows, row_labels = hidden.flatten(0, -2), labels.flatten()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss = _LossAndGradients.apply(rows, weight, row_labels, z_loss, in_triton)
    else:
        loss = _losses(rows, weight, row_labels, in_triton).sum()
    return loss, (labels >= 0).sum()


@under_autocast
def linear_token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, *, backend: str = "auto") -> Tensor:
    """Return −log softmax(hidden · weightᵀ)[label] of every token in nats, fp32 [...], without a gradient.

    The arguments and errors are those of `linear_cross_entropy`; the loss is 0 where the label is negative.

    Example:
        >>> linear_token_losses(torch.ones(3, 2), torch.zeros(4, 2), torch.tensor([0, 3, -1]))
        tensor([1.3863, 1.3863, 0.0000])
    """
    in_triton = _check(hidden, weight, labels, backend)
    return _losses(hidden.flatten(0, -2), weight, labels.flatten(), in_triton).view(labels.shape)


class _LossAndGradients(torch.autograd.Function):
    """Computes the gradients beside the loss, while a chunk's logits exist; backward scales them, in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, z_loss, in_triton):
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        chunks = _chunks(hidden, weight, in_triton)
        # Sums over chunks need fp32; a single product is rounded once.
        sums = weight.dtype if len(chunks) == 1 else torch.promote_types(weight.dtype, torch.float32)
        dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if of_hidden else None
        dweight, losses = None, []
        for chunk in chunks:
            rows = hidden[chunk]
            loss, d_logits = _loss_and_d_logits(rows, weight, labels[chunk], z_loss, in_triton)
            losses.append(loss.sum())
            if of_hidden:
                torch.mm(d_logits, weight, out=dhidden[chunk])
            if of_weight:
                dweight = _add_product(dweight, d_logits.mT, rows, sums)
            del d_logits  # before the next chunk's logits
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        return *(None if dx is None else _scaled(dx, d_loss, ctx.dtype) for dx in ctx.saved_tensors), None, None, None


def _add_product(total: Tensor | None, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total + x · y in dtype; total may be overwritten."""
    if total is None:
        return torch.mm(x, y).to(dtype)
    return total.addmm_(x, y) if dtype == x.dtype else total.add_(torch.mm(x, y))


def _scaled(dx: Tensor, d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return d_loss · dx, rounded to dtype once: with one dimension, d_loss keeps its own dtype in the product."""
    return torch.mul(dx, d_loss.view(1), out=torch.empty(dx.shape, dtype=dtype, device=dx.device))


@torch.no_grad()
def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, in_triton: bool) -> Tensor:
    """Return the loss of every row, fp32 [T]."""
    chunks = _chunks(hidden, weight, in_triton)
    return torch.cat([_token_losses(hidden[chunk], weight, labels[chunk], in_triton) for chunk in chunks])


def _token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, in_triton: bool) -> Tensor:
    if in_triton:
        from lcpt_kernels.triton.fused.cross_entropy import losses_of_logits

        return losses_of_logits(_aligned_logits(hidden, weight), labels, len(weight))
    log_p = _logits(hidden, weight).log_softmax(-1)
    return _picked_losses(log_p, labels.long()[:, None])


def _loss_and_d_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, in_triton: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss of every row of a chunk, fp32 [T], and the gradient of its logits [T, V] in hidden's dtype."""
    if in_triton:
        from lcpt_kernels.triton.fused.cross_entropy import losses_and_gradient_in_place

        logits = _aligned_logits(hidden, weight)
        losses = losses_and_gradient_in_place(logits, labels, len(weight), z_loss)
        return losses, logits[:, : len(weight)]
    label, logits = labels.long()[:, None], _logits(hidden, weight)
    log_p = logits.log_softmax(-1)
    log_z = logits[:, :1] - log_p[:, :1]  # logsumexp
    del logits
    losses = _picked_losses(log_p, label)
    d_logits = log_p.exp_()
    if z_loss:
        d_logits.mul_(1 + 2 * z_loss * log_z)
    d_logits.scatter_add_(1, label.clamp_min(0), d_logits.new_full(label.shape, -1.0))
    return losses, d_logits.masked_fill_(label < 0, 0.0).to(hidden.dtype)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden · weightᵀ in fp32, or float64 for such inputs."""
    return torch.mm(hidden, weight.mT).to(torch.promote_types(hidden.dtype, torch.float32))


def _picked_losses(log_p: Tensor, label: Tensor) -> Tensor:
    return log_p.gather(1, label.clamp_min(0)).neg().masked_fill(label < 0, 0.0).squeeze(1).float()


def _aligned_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden · weightᵀ in hidden's dtype as the first V columns of aligned rows; others hold anything."""
    V = len(weight)
    if V % ALIGNED == 0:
        return torch.mm(hidden, weight.mT)
    logits = torch.empty(len(hidden), -(-V // ALIGNED) * ALIGNED, dtype=hidden.dtype, device=hidden.device)
    torch.mm(hidden, weight.mT, out=logits[:, :V])
    return logits


def _chunks(hidden: Tensor, weight: Tensor, in_triton: bool) -> list[slice]:
    """Cut the tokens into as few chunks as LOGITS allow, of nearly equal size."""
    logits = LOGITS_IN_TRITON if in_triton else LOGITS.get(hidden.device.type, LOGITS_ELSEWHERE)
    count = -(-len(hidden) // max(1, logits // len(weight)))
    if count <= 1:
        return [slice(None)]  # for torch.compile not a number
    tokens = -(-len(hidden) // count)
    return [slice(n * tokens, (n + 1) * tokens) for n in range(count)]


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str) -> bool:
    """Raise ValueError if the arguments do not fit. Return whether the function runs in Triton."""
    check_backend(backend, ("auto", "torch", "triton"))
    require(weight.ndim == 2, f"weight has {weight.ndim} dimensions; [V, d] needs 2")
    require(0 not in weight.shape, f"weight is {list(weight.shape)}; V and d must be at least 1")
    require(hidden.ndim > 1, f"hidden has {hidden.ndim} dimensions; [..., d] needs at least 2")
    require(
        hidden.shape[-1] == weight.shape[1], f"rows of hidden are {hidden.shape[-1]} wide, of weight {weight.shape[1]}"
    )
    require(hidden.dtype == weight.dtype, f"hidden and weight differ in dtype: {hidden.dtype}, {weight.dtype}")
    require(labels.dtype in (torch.int32, torch.int64), f"labels are {labels.dtype}; they must be int32 or int64")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels are {list(labels.shape)}; they must be {list(hidden.shape[:-1])}")
    return dispatch.use_triton("linear_cross_entropy", backend, dispatch.device_obstacle(hidden))
