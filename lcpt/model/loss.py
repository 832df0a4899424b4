"""Compute the cross-entropy of a tied head without ever holding logits [T, V]: a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

LOGITS = {"cpu": 2**20}  # logits that exist at one time: what a core's cache holds, or fills a GPU
LOGITS_ELSEWHERE = 2**26


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of -log softmax(hidden · weightᵀ)[label] in nats (fp32), and the count of labels ≥ 0 (int64).

    hidden [..., d] and weight [V, d] in one dtype; labels int64 [...], negative where nothing is to be predicted.
    """
    losses = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten().long())
    return losses, (labels >= 0).sum()


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(hidden · weightᵀ)[label] of every token in nats, fp32 [...]; 0 where the label is < 0."""
    flat = hidden.flatten(0, -2)
    with torch.no_grad():
        losses = [_log_p_and_losses(flat, weight, labels.flatten(), rows)[1] for rows in _chunks(flat, weight)]
    return torch.cat(losses).view(labels.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, while a chunk's logits exist; backward only scales them.

    With p = softmax(logits):  dhidden = (p - onehot) · weight,  dweight = (p - onehot)ᵀ · hidden.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        total = hidden.new_zeros((), dtype=torch.float32)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if needed:
            dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            log_p, losses = _log_p_and_losses(hidden, weight, labels, rows)
            total += losses.sum()
            if needed:
                label = labels[rows, None]
                p = log_p.exp_().scatter_add_(1, label.clamp_min(0), log_p.new_full(label.shape, -1.0))
                p = p.masked_fill_(label < 0, 0.0).to(weight.dtype)
                dhidden[rows] = p @ weight
                dweight += p.mT @ hidden[rows]
        if needed:
            ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, dloss):
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dloss.to(dhidden.dtype), dweight * dloss.to(dweight.dtype), None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    tokens = max(1, LOGITS.get(hidden.device.type, LOGITS_ELSEWHERE) // len(weight))
    return [slice(start, start + tokens) for start in range(0, len(hidden), tokens)]


def _log_p_and_losses(hidden: Tensor, weight: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    log_p = (hidden[rows] @ weight.mT).float().log_softmax(-1)  # [chunk, V]
    label = labels[rows, None]
    return log_p, -log_p.gather(1, label.clamp_min(0)).masked_fill(label < 0, 0.0).squeeze(1)
