"""Open, check and read a prepared folder."""

from __future__ import annotations

import bisect
import functools
import itertools
from pathlib import Path

import numpy as np

from lcpt.data.manifest import fingerprint_of, load_manifest
from lcpt.data.open_tokenizer import find_tokenizer
from lcpt.data.shard_files import check_shard, check_tokenizer, map_shard

HASHED_AT_OPEN = 2**30  # bytes of shards up to which opening a corpus also verifies their sha256


class Corpus:
    """Reads a prepared folder; its shards are one stream of tokens, in which every document begins with BOS.

    Opening checks the manifest, the tokenizer and the shape of every shard, and with `hash_shards` also the content
    of shards of HASHED_AT_OPEN bytes or less in all (one rank of a node is enough). Raises DataError naming the file.

    Attributes: folder, manifest (dict), fingerprint (hex sha256 of the content), vocab_size, bos_id, tokens (length
    of the stream), tokenizer (its path), tokenizer_sha256, attachments (what a model trained on it needs).
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
        self.tokenizer = find_tokenizer(folder)
        self.attachments = {self.tokenizer.name: self.tokenizer}
        check_tokenizer(self.folder, self.manifest)
        shards = self.manifest["shards"]
        hashed = hash_shards and sum(shard["size_bytes"] for shard in shards) <= HASHED_AT_OPEN
        for shard in shards:
            check_shard(self.folder, self.manifest, shard, hashed)
        self._n_shards = len(shards)
        self._token_starts = [0, *itertools.accumulate(shard["tokens"] for shard in shards)]
        self._document_starts = [0, *itertools.accumulate(shard["documents"] for shard in shards)]
        self._ids = functools.lru_cache(maxsize=4)(self._read_ids)  # of the shards last asked for
        self._shard = functools.cache(self._map_shard)  # an address each, no memory

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
            out[position - start : upto - start] = self._shard(shard)["tokens"][position - first : upto - first]
            position, shard = upto, shard + 1
        return out

    def read_parts(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read many parts of the stream, one behind the other: int64 [n] each -> int64 [sum of lengths].

        A part lies in one shard, as every document does. Parts that rise are read fastest.
        """
        if not len(starts):
            return np.empty(0, dtype=np.int64)
        ends = np.cumsum(lengths)
        out = np.empty(ends[-1], dtype=np.int64)
        positions = np.arange(len(out)) + np.repeat(starts - ends + lengths, lengths)
        shards = np.searchsorted(self._token_starts, starts, side="right") - 1
        begin = 0
        for last in [*np.flatnonzero(np.diff(shards)), len(shards) - 1]:
            tokens, first = self._shard(shards[last])["tokens"], self._token_starts[shards[last]]
            out[begin : ends[last]] = tokens[positions[begin : ends[last]] - first]
            begin = ends[last]
        return out

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Find where documents begin in [start, stop) of the stream: int64, rising."""
        found = [np.empty(0, dtype=np.int64)]
        for shard in self._shards_of(start, stop):
            first, begins = self._token_starts[shard], self._shard(shard)["offsets"][:-1]
            low, high = np.searchsorted(begins, (start - first, stop - first))
            found.append(begins[low:high] + first)
        return np.concatenate(found)

    def document_spans(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Find where the documents with a token in [start, stop) of the stream begin and end: int64, rising."""
        begins, ends = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for shard in self._shards_of(start, stop):
            first, offsets = self._token_starts[shard], self._shard(shard)["offsets"]
            low, high = _overlapping(offsets, start - first, stop - first)
            begins.append(offsets[low:high] + first)
            ends.append(offsets[low + 1 : high + 1] + first)
        return np.concatenate(begins), np.concatenate(ends)

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
        tensors = self._shard(shard)
        start, stop = (self._token_starts[shard] + int(offset) for offset in tensors["offsets"][row : row + 2])
        return self._ids(shard)[row], start, stop, int(tensors["bytes"][row])

    def document_lengths(self) -> np.ndarray:
        """Count the tokens of each document, its BOS among them: int64 [documents]."""
        return np.concatenate([np.diff(self._shard(shard)["offsets"]) for shard in range(self._n_shards)])

    def document_ids(self, start: int, stop: int) -> list[str]:
        """List the ids of the documents that have a token in [start, stop) of the stream."""
        found = []
        for shard in self._shards_of(start, stop):
            first = self._token_starts[shard]
            low, high = _overlapping(self._shard(shard)["offsets"], start - first, stop - first)
            found += self._ids(shard)[low:high]
        return found

    def _shards_of(self, start: int, stop: int) -> range:
        """Number the shards that have a token in [start, stop) of the stream."""
        if start >= stop:
            return range(0)
        first = bisect.bisect_right(self._token_starts, start) - 1
        return range(first, bisect.bisect_left(self._token_starts, stop, lo=first, hi=self._n_shards))

    def _map_shard(self, shard: int) -> dict[str, np.ndarray]:
        listed = self.manifest["shards"][shard]
        return map_shard(self.folder / listed["file"], listed["size_bytes"])

    def _read_ids(self, shard: int) -> list[str]:
        return self._shard(shard)["ids"].tobytes().decode().split("\n")


def _overlapping(offsets: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """Find the rows [low, high) of documents that have a token in [start, stop), from where documents begin."""
    low = np.searchsorted(offsets, max(start, 0), side="right") - 1
    return int(low), int(np.searchsorted(offsets[:-1], stop, side="left"))
