"""Open, check and read a prepared folder."""

from __future__ import annotations

import bisect
import functools
import itertools
from pathlib import Path

import numpy as np

from lcpt.data.manifest import TOKENIZER, fingerprint_of, load_manifest
from lcpt.data.shard_files import check_tokenizer, map_tensor, open_shard

HASHED_AT_OPEN = 2**30  # bytes of shards up to which opening a corpus also verifies their sha256


class Corpus:
    """Reads a prepared folder; its shards are one stream of tokens, in which every document begins with BOS.

    Opening checks the manifest, the tokenizer and the shape of every shard, and with `hash_shards` also the content
    of shards of HASHED_AT_OPEN bytes or less in all (one rank of a node is enough). Raises DataError naming the file.

    Attributes: folder, manifest (dict), fingerprint (hex sha256 of the content), vocab_size, bos_id, tokens (length
    of the stream), tokenizer (path of the model), tokenizer_sha256, attachments (what a model trained on it needs).
    len(corpus) is the number of documents.
    """

    def __init__(self, folder: str | Path, hash_shards: bool = True):
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        self.fingerprint: str = fingerprint_of(self.manifest)
        self.vocab_size: int = self.manifest["vocab_size"]
        self.tokenizer_sha256: str | None = self.manifest["tokenizer_sha256"]
        self.bos_id: int = self.manifest["bos_id"]
        self.tokens: int = self.manifest["tokens"]
        self.tokenizer = self.folder / TOKENIZER
        self.attachments = {TOKENIZER: self.tokenizer}
        check_tokenizer(self.folder, self.manifest)
        shards = self.manifest["shards"]
        hashed = hash_shards and sum(shard["size_bytes"] for shard in shards) <= HASHED_AT_OPEN
        self._files = [open_shard(self.folder, self.manifest, shard, hashed) for shard in shards]
        self._tokens = [file.get_slice("tokens") for file in self._files]
        self._token_starts = [0, *itertools.accumulate(shard["tokens"] for shard in shards)]
        self._document_starts = [0, *itertools.accumulate(shard["documents"] for shard in shards)]
        self._index = functools.lru_cache(maxsize=4)(self._read_index)  # of the shards last asked for
        self._offsets = functools.cache(self._map_offsets)

    def __len__(self) -> int:
        return self.manifest["documents"]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read that part of the stream, int64 [stop - start]. IndexError: not 0 <= start <= stop <= tokens."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        shard = bisect.bisect_right(self._token_starts, start) - 1
        position = start
        while position < stop:
            first, end = self._token_starts[shard : shard + 2]
            upto = min(stop, end)
            out[position - start : upto - start] = self._tokens[shard][position - first : upto - first]
            position, shard = upto, shard + 1
        return out

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Find where documents begin in [start, stop) of the stream: int64, rising."""
        found, shard = [np.empty(0, dtype=np.int64)], bisect.bisect_right(self._token_starts, start) - 1
        while shard < len(self._files) and (first := self._token_starts[shard]) < stop:
            begins = self._offsets(shard)[:-1]
            low, high = np.searchsorted(begins, (start - first, stop - first))
            found.append(begins[low:high] + first)
            shard += 1
        return np.concatenate(found)

    def document(self, number: int) -> tuple[str, np.ndarray, int]:
        """Return (id, tokens int64 [n] with BOS first, bytes of the UTF-8 text) of document 0 <= number < len."""
        identifier, start, stop, n_bytes = self.document_place(number)
        return identifier, self.read(start, stop), n_bytes

    def document_place(self, number: int) -> tuple[str, int, int, int]:
        """Return (id, start and stop in the stream, bytes of the UTF-8 text) of document 0 <= number < len."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        shard = bisect.bisect_right(self._document_starts, number) - 1
        row = number - self._document_starts[shard]
        ids, offsets, sizes = self._index(shard)
        start, stop = (self._token_starts[shard] + int(offset) for offset in offsets[row : row + 2])
        return ids[row], start, stop, int(sizes[row])

    def document_lengths(self) -> np.ndarray:
        """Count the tokens of each document, its BOS among them: int64 [documents]."""
        return np.concatenate([np.diff(file.get_tensor("offsets")) for file in self._files])

    def document_ids(self, start: int, stop: int) -> list[str]:
        """List the ids of the documents that have a token in [start, stop) of the stream."""
        found = []
        for shard, (first, end) in enumerate(itertools.pairwise(self._token_starts)):
            if max(start, first) < min(stop, end):
                ids, offsets, _ = self._index(shard)
                low = np.searchsorted(offsets, max(start, first) - first, side="right") - 1
                high = np.searchsorted(offsets, min(stop, end) - first, side="left")
                found += ids[low:high]
        return found

    def _map_offsets(self, shard: int) -> np.ndarray:
        """Map into memory where the documents of a shard begin, int64 [documents + 1]."""
        return map_tensor(self.folder / self.manifest["shards"][shard]["file"], "offsets")

    def _read_index(self, shard: int) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Read (ids, offsets int64 [documents + 1], bytes int64 [documents]) of a shard."""
        file = self._files[shard]
        ids = file.get_tensor("ids").tobytes().decode().split("\n")
        return ids, file.get_tensor("offsets"), file.get_tensor("bytes")
