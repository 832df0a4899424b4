"""Draw samples from a prepared folder: windows of its token stream, wherever documents begin and end.

Windows are ordered by `order.py`. Where a run goes over to a longer context, the order is one of windows of the longest
context, which a shorter one cuts in parts: so a longer window begins where the shorter ones before it ended.
"""

from __future__ import annotations

import numpy as np

from lcpt.data.corpus_samples import CorpusSamples
from lcpt.data.errors import DataError
from lcpt.data.order import n_windows, window_start
from lcpt.data.sample_source import Sample
from lcpt.data.shards import Corpus


class Contiguous(CorpusSamples):
    """Is a SampleSource of the windows of a corpus.

    mask_documents: documents in a window are apart, and no label crosses a border. longest: the context of the windows
    that are ordered, a multiple of every context asked for; None: that context.
    """

    def __init__(self, corpus: Corpus, mask_documents: bool = True, longest: int | None = None):
        super().__init__(corpus)
        self._mask, self._longest = mask_documents, longest

    def samples_in_epoch(self, context: int) -> int:
        longest = self._longest_of(context)
        return n_windows(self.corpus.tokens, longest) * (longest // context)

    def sample(self, number: int, seed: int, context: int) -> Sample:
        """Return a window of the stream: labels are the inputs one token later."""
        start, stop = self._window(number, seed, context)
        tokens = self.corpus.read(start, stop + 1)
        inputs, labels, length = tokens[:-1], tokens[1:].copy(), stop - start
        starts = None
        if self._mask:
            borders = self.corpus.document_starts(start + 1, stop + 1) - start
            labels[borders - 1] = -1
            starts = np.concatenate([[0], borders[borders < length], [length] if length < context else []])
            starts = starts.astype(np.int64)
        missing = context - length
        if missing:
            inputs, labels = np.pad(inputs, (0, missing)), np.pad(labels, (0, missing), constant_values=-1)
        return Sample(inputs, labels, starts, missing)

    def documents(self, number: int, seed: int, context: int) -> list[str]:
        """List the ids of the documents in that window."""
        start, stop = self._window(number, seed, context)
        return self.corpus.document_ids(start, stop + 1)

    def order(self, context: int) -> str:
        return f"windows of {self._longest_of(context)}"

    def _window(self, number: int, seed: int, context: int) -> tuple[int, int]:
        """Return where a sample begins and ends in the stream."""
        longest = self._longest_of(context)
        window, part = divmod(self.used // context + number, longest // context)
        start = window_start(window, self.corpus.tokens, longest, seed, self.fingerprint) + part * context
        return start + (self.used % context if number == 0 else 0), start + context

    def _longest_of(self, context: int) -> int:
        longest = self._longest or context
        if longest % context:
            raise DataError(
                f"data.context {context} does not divide {longest}, the longest that a phase takes of it; take "
                "another, or data.packing=best_fit"
            )
        return longest
