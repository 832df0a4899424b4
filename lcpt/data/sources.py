"""Open what data.path or data.sources name, as a source of training samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lcpt.data.config import DataConfig
from lcpt.data.contiguous import Contiguous
from lcpt.data.mixture import Mixture
from lcpt.data.shards import Corpus


def open_text(
    data: DataConfig,
    open_corpus: Callable[[str], Corpus] = Corpus,
    longest: int | None = None,
    used: Mapping[str, int] | None = None,
) -> Contiguous | Mixture:
    """Open the prepared folders of training.

    longest: see Contiguous. used: tokens that the run has drawn before, by the fingerprint of the folder. Raises
    DataError where a folder cannot be opened, or does not go with the others.
    """

    def samples(path: str) -> Contiguous:
        corpus = open_corpus(path)
        return Contiguous(corpus, data.mask_documents, longest, (used or {}).get(corpus.fingerprint, 0))

    if data.sources is None:
        return samples(data.path or "")
    return Mixture(data.sources, [samples(source.path) for source in data.sources])
