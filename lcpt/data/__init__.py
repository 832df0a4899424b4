"""Turn text into tokens, shards, an order and batches; turn tasks into batches."""

from lcpt.data.batches import Batch, BatchPhase, Prefetcher, batch, batch_documents, rows
from lcpt.data.best_fit import BestFit
from lcpt.data.config import DataConfig
from lcpt.data.contiguous import Contiguous
from lcpt.data.corpus_samples import CorpusSamples
from lcpt.data.errors import DataError
from lcpt.data.find_text import find_sources
from lcpt.data.mixture import Mixture, SourceConfig
from lcpt.data.open_tokenizer import AnyTokenizer, find_tokenizer, open_tokenizer
from lcpt.data.packed_documents import padded_offsets
from lcpt.data.prepare import prepare
from lcpt.data.sample_source import Drawn, Sample, SampleSource
from lcpt.data.shards import Corpus
from lcpt.data.sources import open_text
from lcpt.data.streamed_text import StreamedText
from lcpt.data.synthetic import SyntheticConfig, Task, is_task
from lcpt.data.text import read_documents
from lcpt.data.tokenizer import Tokenizer
from lcpt.data.verify import verify

__all__ = [
    "AnyTokenizer",
    "Batch",
    "BatchPhase",
    "BestFit",
    "Contiguous",
    "Corpus",
    "CorpusSamples",
    "DataConfig",
    "DataError",
    "Drawn",
    "Mixture",
    "Prefetcher",
    "Sample",
    "SampleSource",
    "StreamedText",
    "SourceConfig",
    "SyntheticConfig",
    "Task",
    "Tokenizer",
    "batch",
    "batch_documents",
    "find_sources",
    "find_tokenizer",
    "is_task",
    "open_text",
    "open_tokenizer",
    "padded_offsets",
    "prepare",
    "read_documents",
    "rows",
    "verify",
]
