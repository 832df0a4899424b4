"""Text to tokens to shards to order to batches."""

from lcpt.data.batches import DataConfig, Prefetcher, batch, batch_documents, rows
from lcpt.data.errors import DataError
from lcpt.data.prepare import prepare
from lcpt.data.shards import Corpus
from lcpt.data.text import find_sources, read_documents
from lcpt.data.tokenizer import Tokenizer
from lcpt.data.verify import verify

__all__ = [
    "Corpus",
    "DataConfig",
    "DataError",
    "Prefetcher",
    "Tokenizer",
    "batch",
    "batch_documents",
    "find_sources",
    "prepare",
    "read_documents",
    "rows",
    "verify",
]
