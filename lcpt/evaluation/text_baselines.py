"""Compute what a language model must beat on the same text: a general-purpose compressor, and token frequencies."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable

import numpy as np


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Measure the bits a byte of `xz -9` on all texts together."""
    raw = "".join(texts).encode()
    return 8 * len(lzma.compress(raw, preset=9)) / len(raw)


def unigram_bits_per_byte(
    train: Iterable[np.ndarray], scored: Iterable[np.ndarray], vocab_size: int, n_bytes: int
) -> float:
    """Compute the bits a byte of `train`'s token frequencies, one added to each count, on `scored` without its BOS.

    n_bytes: of the text of `scored`.
    """
    counts = np.ones(vocab_size)
    for tokens in train:
        counts += np.bincount(tokens[1:], minlength=len(counts))
    nats = -np.log(counts / counts.sum())
    seen = np.concatenate([tokens[1:] for tokens in scored])
    return float(nats[seen].sum() / n_bytes / math.log(2))
