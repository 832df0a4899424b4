"""Read documents to score: from a prepared folder, or from text that the checkpoint's own tokenizer encodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lcpt.data.errors import DataError
from lcpt.data.find_text import find_sources
from lcpt.data.manifest import MANIFEST
from lcpt.data.open_tokenizer import AnyTokenizer
from lcpt.data.shards import Corpus
from lcpt.data.text import read_documents


def documents(path: str | Path, tokenizer: AnyTokenizer) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield (id, tokens int64 [n + 1] with BOS first, bytes of the UTF-8 text) of each document.

    Blank documents are left out, as in a prepared folder. Raises DataError for what cannot be read, and for a folder
    prepared with another tokenizer.
    """
    if (Path(path) / MANIFEST).is_file():
        corpus = Corpus(path)
        if corpus.manifest["tokenizer_sha256"] != tokenizer.sha256:
            raise DataError(f"{path} was prepared with another tokenizer than the checkpoint's; give the text itself")
        yield from (corpus.document(number) for number in range(len(corpus)))
        return
    for source in find_sources([path]).sources:
        for identifier, text in read_documents(source):
            if text.strip():
                tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text)], dtype=np.int64)
                yield identifier, tokens, len(text.encode())
