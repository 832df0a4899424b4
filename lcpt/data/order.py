"""Choose the window of the token stream that is training sample number g, and permute numbers.

Every epoch cuts the stream into windows from its own random start, so that borders fall elsewhere each time, and
visits each window once in its own random order. The order is computed, not stored: nothing to build, share or save.
"""

from __future__ import annotations

import hashlib
import struct

from lcpt.data.errors import DataError

ROUNDS = 6
MASK = 2**64 - 1


def n_windows(tokens: int, context: int) -> int:
    """Count the windows of an epoch, any epoch. Raises DataError when the stream is shorter than one window."""
    if tokens < context + 1:
        raise DataError(f"{tokens:,} tokens are less than a window of {context:,} + 1; use more text or less context")
    return max(1, (tokens - context) // context)  # as many as fit behind the latest start, context - 1


def window_start(sample: int, tokens: int, context: int, seed: int, fingerprint: str) -> int:
    """Find where in a stream of `tokens` the context + 1 tokens of sample 0, 1, 2, … begin."""
    windows = n_windows(tokens, context)
    epoch, index = divmod(sample, windows)
    offset, *keys = draws(seed, fingerprint, epoch)
    latest = min(context - 1, tokens - 1 - windows * context)
    return offset % (latest + 1) + permute(index, windows, keys) * context


def permute(index: int, size: int, keys: list[int]) -> int:
    """Map 0 <= index < size by a permutation that the keys choose, one 64-bit key a round.

    A Feistel network permutes the numbers of 2·half bits; walking on until one is below `size` makes that a
    permutation of exactly `size` numbers, in less than four steps on average.
    """
    half = ((size - 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        index = left << half | right
        if index < size:
            return index


def draws(seed: int, fingerprint: str, epoch: int) -> tuple[int, ...]:
    """Draw 1 + ROUNDS random 64-bit numbers: a choice, and the keys of a permutation."""
    digest = hashlib.blake2b(f"{seed}/{fingerprint}/{epoch}".encode(), digest_size=8 * (1 + ROUNDS)).digest()
    return struct.unpack(f"<{1 + ROUNDS}Q", digest)


def _mix(number: int) -> int:
    """Spread every bit over all 64: multiply and fold, twice (odd constants of SplitMix64)."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31
