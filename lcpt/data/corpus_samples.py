"""Define what the ways to draw samples from one prepared folder have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lcpt.data.errors import DataError
from lcpt.data.sample_source import Drawn, Sample
from lcpt.data.shards import Corpus


class CorpusSamples(ABC):
    """Is a SampleSource of a prepared folder."""

    used = 0  # tokens that the run drew of it before sample 0, which is short where they end within one
    passed = 0  # of those, the ones it passed over

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.folder, self.vocab_size, self.fingerprint = corpus.folder, corpus.vocab_size, corpus.fingerprint
        self.tokenizer_sha256, self.attachments = corpus.tokenizer_sha256, corpus.attachments

    @abstractmethod
    def samples_in_epoch(self, context: int) -> int:
        """Count the samples of an epoch, any epoch. Raises DataError where there are none."""

    @abstractmethod
    def order(self, context: int) -> str:
        """Name the order in which samples of that context come: positions are of one order."""

    @abstractmethod
    def sample(self, number: int, seed: int, context: int) -> Sample:
        """Return sample 0, 1, 2, …"""

    @abstractmethod
    def documents(self, number: int, seed: int, context: int) -> list[str]:
        """List the ids of the documents in that sample."""

    def check_context(self, context: int) -> None:
        """Raise DataError when the folder has no sample of that context."""
        try:
            self.samples_in_epoch(context)
        except DataError as error:
            raise DataError(f"{self.folder}: {error}") from None

    def drawn(self, samples: int, context: int) -> dict[str, Drawn]:
        """Count what is used of the folder after the first `samples` samples, padding among it."""
        tokens = (self.used // context + samples) * context if samples else self.used
        epochs = tokens / (self.samples_in_epoch(context) * context)
        return {str(self.folder): Drawn(tokens, epochs, self.fingerprint, self.order(context), self.passed)}
