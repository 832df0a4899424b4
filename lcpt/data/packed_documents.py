"""Write the borders of packed documents as attention takes them: cu_seqlens, the offsets at which documents begin.

The samples of a micro-batch lie one after the other in one row; each begins a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST = 16  # documents: few enough to cost nothing, and most micro-batches of long texts get offsets of one length


def cu_seqlens(micro_batches: Sequence[Sequence[np.ndarray]], context: int) -> np.ndarray:
    """Return the offsets of each micro-batch, int32 [micro-batches, N + 1], from the starts in each of its samples.

    They end in the number of tokens, repeated up to one length: N is LEAST, doubled until the micro-batch with the most
    documents fits. So compiled code meets few shapes, and kernels few documents that are empty.
    """
    offsets = [
        np.concatenate([starts + number * context for number, starts in enumerate(samples)])
        for samples in micro_batches
    ]
    tokens = max(map(len, micro_batches)) * context
    n, most = LEAST, max(map(len, offsets))
    while n < most:
        n *= 2
    padded = np.full((len(offsets), n + 1), tokens, dtype=np.int32)
    for row, found in zip(padded, offsets, strict=True):
        row[: len(found)] = found
    return padded
