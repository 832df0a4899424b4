"""Open what data.path or data.sources name, as a source of training samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lcpt.data.best_fit import BestFit
from lcpt.data.config import DataConfig
from lcpt.data.contiguous import Contiguous
from lcpt.data.corpus_samples import CorpusSamples
from lcpt.data.mixture import Mixture
from lcpt.data.shards import Corpus


def open_text(
    data: DataConfig,
    open_corpus: Callable[[str], Corpus] = Corpus,
    longest: int | None = None,
    used: Mapping[str, int] | None = None,
) -> CorpusSamples | Mixture:
    """Open the prepared folders of training.

    longest: see Contiguous. used: tokens that the run has drawn before, by the fingerprint of the folder. Raises
    DataError where a folder cannot be opened, or does not go with the others.
    """

    def samples(path: str) -> CorpusSamples:
        corpus = open_corpus(path)
        before = (used or {}).get(corpus.fingerprint, 0)
        if data.packing == "best_fit":
            return BestFit(corpus, longest, before)
        return Contiguous(corpus, data.mask_documents, longest, before)

    if data.sources is None:
        return samples(data.path or "")
    return Mixture(data.sources, [samples(source.path) for source in data.sources])
