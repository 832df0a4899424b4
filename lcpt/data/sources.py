"""Open what data.path or data.sources name, as a source of training samples that goes on where a run has come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from lcpt.data.best_fit import BestFit
from lcpt.data.config import DataConfig
from lcpt.data.contiguous import Contiguous
from lcpt.data.corpus_samples import CorpusSamples
from lcpt.data.mixture import Mixture
from lcpt.data.sample_source import Drawn
from lcpt.data.shards import Corpus


def open_text(
    data: DataConfig,
    open_corpus: Callable[[str], Corpus] = Corpus,
    longest: Mapping[str, int] | None = None,
    before: Iterable[Drawn] = (),
) -> CorpusSamples | Mixture:
    """Open the prepared folders of training.

    longest: see Contiguous, by fingerprint. before: what the run has drawn by now. Raises DataError where a folder
    cannot be opened, or does not go with the others.
    """
    known = {drawn.fingerprint: drawn for drawn in before}

    def samples(path: str) -> CorpusSamples:
        corpus = open_corpus(path)
        if data.packing == "best_fit":
            found: CorpusSamples = BestFit(corpus)
        else:
            found = Contiguous(corpus, data.mask_documents, (longest or {}).get(corpus.fingerprint))
        if drawn := known.get(found.fingerprint):
            found.used = position(found, drawn, data.context)
            found.passed = drawn.passed + found.used - drawn.tokens
        return found

    if data.sources is None:
        return samples(data.path or "")
    return Mixture(data.sources, [samples(source.path) for source in data.sources])


def position(source: CorpusSamples, drawn: Drawn, context: int) -> int:
    """Find where a source goes on, in tokens: where it stopped, or in another order with the next epoch."""
    if drawn.order == source.order(context):
        return drawn.tokens
    return math.ceil(drawn.epochs or 0) * source.samples_in_epoch(context) * context
