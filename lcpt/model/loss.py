"""Compute the cross-entropy of the head without ever holding logits [T, V]; kernels and chunks are lcpt_kernels'."""

from __future__ import annotations

from lcpt_kernels import linear_cross_entropy, linear_token_losses
from torch import Tensor


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the sum of -log softmax(hidden · weightᵀ)[label] in nats (fp32), and the count of labels ≥ 0 (int64).

    hidden [..., d] and weight [V, d] in one dtype; labels int32 or int64 [...], negative where nothing is to be
    predicted. z_loss is the coefficient of the z-loss, which has a gradient only.
    """
    return linear_cross_entropy(hidden, weight, labels, z_loss=z_loss)


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(hidden · weightᵀ)[label] of every token in nats, fp32 [...]; 0 where the label is < 0."""
    return linear_token_losses(hidden, weight, labels)
