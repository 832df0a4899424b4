"""Draw samples from a prepared folder: documents packed whole into sequences, only those longer than one cut.

The stream is divided into regions of equal length, some 254 contexts each, and each region is packed on its own, when
a sample of it is asked for. So nothing is built at the start or stored, whatever the size of the folder.

A document longer than the context is cut into as few pieces as hold it, all full but one: its last in even epochs, its
first in odd ones, so that cuts fall elsewhere. A piece belongs to the region in which it begins. `packing.py` packs the
pieces of a region into its sequences.

Each epoch takes the regions in its own order, GROUP of them at a time, whose sequences it mixes: so many packings are
what a rank holds.
"""

from __future__ import annotations

import functools

import numpy as np

from lcpt.data.corpus_samples import CorpusSamples
from lcpt.data.errors import DataError
from lcpt.data.order import draws, permute
from lcpt.data.packing import Packing, Parts, best_fit_decreasing
from lcpt.data.sample_source import Sample
from lcpt.data.shards import Corpus

REGION = 254  # contexts at least: a hundredth is one for the pieces that cross a region's end, and room to spare
GROUP = 16  # regions


class BestFit(CorpusSamples):
    """Is a SampleSource of sequences that are packed with whole documents, each token in one of an epoch.

    Padding is 1 % at most in an epoch of 100 sequences or more, and less than one sequence in a shorter one.
    """

    def __init__(self, corpus: Corpus):
        super().__init__(corpus)
        self._packing = functools.lru_cache(maxsize=GROUP)(self.pack)

    def samples_in_epoch(self, context: int) -> int:
        regions, bins = self.shape(context)
        return regions * bins

    def order(self, context: int) -> str:
        return f"sequences of {context}, packed"

    def sample(self, number: int, seed: int, context: int) -> Sample:
        """Return a packed sequence: each label is the next token of the document, wherever that lies."""
        parts = self._parts(number, seed, context)
        ends = np.cumsum(parts.lengths)
        length = int(parts.lengths.sum())
        inputs, labels = np.zeros(context, dtype=np.int64), np.empty(context, dtype=np.int64)
        inputs[:length] = self.corpus.read_parts(parts.starts, parts.lengths)
        labels[:-1] = inputs[1:]
        labels[length:] = labels[ends - 1] = -1
        cut, after = ends[parts.continues], parts.starts[parts.continues] + parts.lengths[parts.continues]
        labels[cut - 1] = self.corpus.read_parts(after, np.ones_like(after))
        starts = np.concatenate([ends - parts.lengths, [length] if length < context else []]).astype(np.int64)
        return Sample(inputs, labels, starts, context - length)

    def documents(self, number: int, seed: int, context: int) -> list[str]:
        """List the ids of the documents in that sequence."""
        starts = self._parts(number, seed, context).starts.tolist()
        names = [name for start in starts for name in self.corpus.document_ids(start, start + 1)]
        return list(dict.fromkeys(names))

    def shape(self, context: int) -> tuple[int, int]:
        """Count (regions, sequences of each). Raises DataError where there is no token.

        A region has less than a context of tokens more than its length, which the sequences hold; more of them, up
        to 1 % of padding, leave the pieces room to stay whole.
        """
        tokens = self.corpus.tokens
        if not tokens:
            raise DataError(f"{self.folder} has no tokens; prepare it from text")
        regions = max(1, tokens // (REGION * context))
        needed = -(-tokens // (regions * context)) + (regions > 1)
        return regions, max(needed, 100 * tokens // (99 * regions * context))

    def _parts(self, number: int, seed: int, context: int) -> Parts:
        """Find the parts of the stream in a sample."""
        regions, bins = self.shape(context)
        epoch, index = divmod(self.used // context + number, regions * bins)
        group, within = divmod(index, GROUP * bins)
        first = group * GROUP
        _, *keys = draws(seed, self.fingerprint, epoch)
        _, *own_keys = draws(seed, f"{self.fingerprint}/{group}", epoch)
        slot, number_in_region = divmod(permute(within, min(GROUP, regions - first) * bins, own_keys), bins)
        region = permute(first + slot, regions, keys)
        return self._packing(region, context, epoch % 2 == 1).bin(number_in_region)

    def pack(self, region: int, context: int, short_first: bool) -> Packing:
        """Pack a region of the stream."""
        regions, bins = self.shape(context)
        begin, end = (self.corpus.tokens * i // regions for i in (region, region + 1))
        pieces = cut_documents(*self.corpus.document_spans(begin, end), begin, end, context, short_first)
        return best_fit_decreasing(pieces, bins, context)


def cut_documents(
    starts: np.ndarray, ends: np.ndarray, begin: int, end: int, context: int, short_first: bool = False
) -> Parts:
    """Cut documents, int64 [documents] each, into as few pieces as a context holds: those beginning in [begin, end).

    All pieces of a document but the last, or with short_first the first, have the context's length.
    """
    lengths = ends - starts
    counts = -(-lengths // context)
    first = lengths - (counts - 1) * context if short_first else context
    seconds = np.minimum(starts + first, ends)  # where the second piece begins: piece j is (j - 1) · context behind it
    low = np.where(starts >= begin, 0, 1 + np.maximum(0, -((seconds - begin) // context)))
    high = np.minimum(counts, 1 + np.maximum(0, -((seconds - end) // context)))
    repeats = np.maximum(0, high - low)
    of = np.repeat(np.arange(len(starts)), repeats)
    j = np.arange(len(of)) - np.repeat(np.cumsum(repeats) - repeats - low, repeats)
    piece_starts = np.where(j == 0, starts[of], seconds[of] + (j - 1) * context)
    piece_ends = np.minimum(seconds[of] + j * context, ends[of])
    return Parts(piece_starts, piece_ends - piece_starts, piece_ends < ends[of])
