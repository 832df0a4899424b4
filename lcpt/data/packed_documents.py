"""Write the borders of packed documents as attention takes them: cu_seqlens, the offsets at which documents begin.

The samples of a micro-batch lie one after the other in one row; each begins a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST = 16  # documents: few enough to cost nothing, and most micro-batches of long texts get offsets of one length


def cu_seqlens(micro_batches: Sequence[Sequence[np.ndarray]], context: int) -> np.ndarray:
    """Return the offsets of each micro-batch, int32 [micro-batches, N + 1], from the starts in each of its samples.

    They end in the number of tokens, see padded_offsets.
    """
    tokens = max(map(len, micro_batches)) * context
    return padded_offsets(
        [
            [*np.concatenate([starts + number * context for number, starts in enumerate(samples)]), tokens]
            for samples in micro_batches
        ]
    )


def padded_offsets(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return rows of offsets, int32 [rows, N + 1], whose last entries are repeated up to one length.

    N is LEAST, doubled until the row with the most documents fits. So compiled code meets few shapes, and kernels few
    documents that are empty.
    """
    n, most = LEAST, max(map(len, rows)) - 1
    while n < most:
        n *= 2
    padded = np.empty((len(rows), n + 1), dtype=np.int32)
    for row, offsets in zip(padded, rows, strict=True):
        row[: len(offsets)] = offsets
        row[len(offsets) :] = offsets[-1]
    return padded
