"""Write documents to shard files, one after the other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save

SHARD_TOKENS = 64 * 2**20


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the narrower of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class ShardWriter:
    """Collects documents and writes shard-XXXXX.safetensors files of about `shard_tokens` tokens.

    A shard holds `tokens` [n], each document's ids in turn; `offsets` int64 [documents + 1], where each begins;
    `bytes` int64 [documents], the UTF-8 length of each text; `ids` uint8, the document ids joined by newlines. A
    document is never cut: one that would overfill the shard begins the next one. `shards` lists the files written;
    `content` hashes the tokenizer and all tokens.
    """

    def __init__(self, folder: Path, dtype: np.dtype, tokenizer_sha256: str, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.dtype = folder, dtype
        self.tokenizer_sha256, self.shard_tokens = tokenizer_sha256, shard_tokens
        self.shards: list[dict] = []
        self.content = hashlib.sha256(tokenizer_sha256.encode())
        self._start()

    def _start(self) -> None:
        self._n_tokens = 0
        self._ids: list[str] = []
        self._tokens: list[np.ndarray] = []
        self._bytes: list[int] = []

    def add(self, identifier: str, tokens: np.ndarray, n_bytes: int) -> None:
        """Append a document: its id, its tokens [n] with BOS first, the UTF-8 length of its text."""
        if self._n_tokens + len(tokens) > self.shard_tokens:
            self.close()
        self._n_tokens += len(tokens)
        self._ids.append(identifier)
        self._tokens.append(tokens.astype(self.dtype, copy=False))
        self.content.update(self._tokens[-1].tobytes())
        self._bytes.append(n_bytes)

    def close(self) -> None:
        """Write the documents collected so far as a shard."""
        if not self._n_tokens:
            return
        path = self.folder / f"shard-{len(self.shards):05d}.safetensors"
        tensors = {
            "tokens": np.concatenate(self._tokens),
            "offsets": np.cumsum([0, *map(len, self._tokens)], dtype=np.int64),
            "bytes": np.array(self._bytes, dtype=np.int64),
            "ids": np.frombuffer("\n".join(self._ids).encode(), dtype=np.uint8),
        }
        # One key only: safetensors writes several in no fixed order.
        content = save(tensors, metadata={"tokenizer_sha256": self.tokenizer_sha256})
        path.write_bytes(content)  # not save_file: that makes files which only their owner can read
        self.shards.append(
            {
                "file": path.name,
                "size_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "tokens": self._n_tokens,
                "documents": len(self._ids),
                "bytes": sum(self._bytes),
            }
        )
        self._start()
