"""Prepare data: write a folder of a tokenizer, shards, and at last the manifest."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lcpt.data.atomic_folder import new_folder, refuse_existing
from lcpt.data.errors import DataError
from lcpt.data.find_text import Found, TextSource, find_sources
from lcpt.data.manifest import MANIFEST, SCHEMA_VERSION, render, with_sha256
from lcpt.data.open_tokenizer import SENTENCEPIECE, AnyTokenizer, name_in_folder, open_tokenizer
from lcpt.data.parallel_encode import encode_all
from lcpt.data.text import read_documents
from lcpt.data.tokenizer import train_tokenizer
from lcpt.data.writer import SHARD_TOKENS, ShardWriter, token_dtype
from lcpt.utils.progress import progress_bar

VOCAB_SIZE = 32_000


def prepare(
    inputs: Iterable[str | Path],
    output: str | Path,
    tokenizer: str | Path | None = None,
    vocab_size: int = VOCAB_SIZE,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    text_field: str = "text",
) -> dict:
    """Tokenise every document of the inputs into the folder `output`; trains a tokenizer when none is given.

    text_field: of JSON and parquet records. The folder's bytes depend on what is given here and in the inputs, not on
    `workers` or the time.
    Returns {"manifest": …, "empty_documents": skipped ones, "training_fraction": of the lines, for the tokenizer}.
    Raises DataError for what the user can put right; on any error `output` does not exist.
    """
    if workers < 1 or shard_tokens < 1 or vocab_size < 1:
        raise DataError(f"workers {workers}, shard_tokens {shard_tokens}, vocab_size {vocab_size}: 1 is the least")
    refuse_existing(output)
    found = find_sources(inputs, text_field)
    sources = found.sources
    fraction = 1.0
    with new_folder(output) as folder:
        if tokenizer is None:
            model, fraction = train_tokenizer(_training_texts(sources), vocab_size)
            copy = folder / SENTENCEPIECE
            copy.write_bytes(model)
        else:
            copy = folder / name_in_folder(tokenizer)
            shutil.copyfile(open_tokenizer(tokenizer).path, copy)
        manifest, empty = _tokenise(found, open_tokenizer(copy), folder, workers, shard_tokens)
        (folder / MANIFEST).write_bytes(render(manifest))
    return {"manifest": manifest, "empty_documents": empty, "training_fraction": fraction}


def _training_texts(sources: list[TextSource]) -> Iterator[str]:
    with progress_bar(desc="reading for the tokenizer", unit="char", unit_scale=True) as bar:
        for source in sources:
            for _, text in read_documents(source):
                bar.update(len(text))
                yield text


def _tokenise(found: Found, tokenizer: AnyTokenizer, folder: Path, workers: int, shard_tokens: int) -> tuple[dict, int]:
    """Write the shards; returns the manifest and the number of empty documents that were left out."""
    counts: list[dict[str, Any]] = [{"name": source.name, "documents": 0, "bytes": 0} for source in found.sources]
    empty = not_exact = 0

    def documents() -> Iterator[tuple[tuple[int, str], str]]:
        nonlocal empty
        for number, source in enumerate(found.sources):
            for identifier, text in read_documents(source):
                if text.strip():
                    yield (number, identifier), text
                else:
                    empty += 1

    dtype = token_dtype(tokenizer.vocab_size)
    writer = ShardWriter(folder, dtype, tokenizer.sha256, shard_tokens)
    with progress_bar(desc="tokenising", unit="B", unit_scale=True) as bar:
        for (number, identifier), tokens, n_bytes, exact in encode_all(documents(), tokenizer, workers):
            writer.add(identifier, tokens, n_bytes)
            counts[number]["documents"] += 1
            counts[number]["bytes"] += n_bytes
            not_exact += not exact
            bar.update(n_bytes)
        writer.close()
    if not writer.shards:
        raise DataError(f"the input holds no text ({empty} empty documents); check --input")
    manifest = with_sha256(
        {
            "schema_version": SCHEMA_VERSION,
            "dtype": str(dtype),
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "tokenizer_sha256": tokenizer.sha256,
            "fingerprint": writer.content.hexdigest(),
            "tokens": sum(shard["tokens"] for shard in writer.shards),
            "documents": sum(shard["documents"] for shard in writer.shards),
            "bytes": sum(shard["bytes"] for shard in writer.shards),
            "documents_not_exact": not_exact,
            "sources": counts,
            "read": dict(sorted(Counter(source.kind for source in found.sources).items())),
            "passed_over": found.passed_over,
            "shards": writer.shards,
        }
    )
    return manifest, empty
