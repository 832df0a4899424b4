"""Compute the learning rate of a step: linear warm-up, then cosine decay or warm-up-stable-decay (WSD)."""

from __future__ import annotations

import math

from lcpt.training.config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Compute the rate of step 0 … max_steps - 1: lr at the end of warm-up, final_lr_fraction · lr at the last step.

    cosine: half a cosine. wsd: constant, then linear over the last `decay_fraction` of all steps (arXiv 2404.06395).
    """
    warmup, last, cosine = training.warmup_steps, training.max_steps, training.schedule == "cosine"
    if step < warmup:
        return training.lr * (step + 1) / warmup
    start = warmup if cosine else max(warmup, round(last * (1 - training.decay_fraction)))
    if step < start:
        return training.lr
    progress = (step + 1 - start) / (last - start)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if cosine else 1 - progress
    return training.lr * (training.final_lr_fraction + (1 - training.final_lr_fraction) * remaining)
