"""Open, check and read a prepared folder."""

from __future__ import annotations

import bisect
import functools
import itertools
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lcpt.data.errors import DataError
from lcpt.data.manifest import TOKENIZER, fingerprint_of, load_manifest
from lcpt.data.order import n_windows, window_start
from lcpt.data.sample_source import Drawn
from lcpt.utils.errors import first_line
from lcpt.utils.hashing import file_sha256

HASHED_AT_OPEN = 2**30  # bytes of shards up to which opening a corpus also verifies their sha256
SAFETENSORS_NAME = {"uint16": "U16", "uint32": "U32"}
REMEDY = "prepare the data again, or restore the file"


class Corpus:
    """Reads a prepared folder; its shards are one stream of tokens, in which every document begins with BOS.

    Opening checks the manifest, the tokenizer and the shape of every shard, and with `hash_shards` also the content
    of shards of HASHED_AT_OPEN bytes or less in all (one rank of a node is enough). Raises DataError naming the file.

    Attributes: folder, manifest (dict), fingerprint (hex sha256 of the content), vocab_size, bos_id, tokens (length
    of the stream), tokenizer (path of the model), and those of a SampleSource.
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

    def scored(self, context: int) -> int:
        """Count the labels of a sample, all ≥ 0. Raises DataError when the stream is shorter than one window."""
        n_windows(self.tokens, context)
        return context

    def sample(self, number: int, seed: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a window of the stream: labels are the inputs one token later."""
        window = self.read(*self._window(number, seed, context))
        return window[:-1], window[1:]

    def documents(self, number: int, seed: int, context: int) -> list[str]:
        """List the ids of the documents in that window."""
        return self.document_ids(*self._window(number, seed, context))

    def drawn(self, samples: int, context: int) -> dict[str, Drawn]:
        """Count what the first `samples` samples use of the folder."""
        return {str(self.folder): Drawn(samples * context, samples / n_windows(self.tokens, context))}

    def _window(self, number: int, seed: int, context: int) -> tuple[int, int]:
        start = window_start(number, self.tokens, context, seed, self.fingerprint)
        return start, start + context + 1

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

    def _read_index(self, shard: int) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Read (ids, offsets int64 [documents + 1], bytes int64 [documents]) of a shard."""
        file = self._files[shard]
        ids = file.get_tensor("ids").tobytes().decode().split("\n")
        return ids, file.get_tensor("offsets"), file.get_tensor("bytes")


def check_tokenizer(folder: Path, manifest: dict) -> None:
    """Raise DataError unless the folder's tokenizer is the one that made its tokens."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise DataError(f"{path}: missing; {REMEDY}")
    if file_sha256(path) != manifest["tokenizer_sha256"]:
        raise DataError(f"{path}: is not the tokenizer that made these tokens, or is damaged; {REMEDY}")


def open_shard(folder: Path, manifest: dict, shard: dict, hashed: bool) -> safe_open:
    """Open a shard, memory-mapped. Raises DataError unless it is the one of the manifest."""
    path = folder / shard["file"]
    if not path.is_file():
        raise DataError(f"{path}: missing; {REMEDY}")
    size = path.stat().st_size
    if size < shard["size_bytes"]:
        raise DataError(f"{path}: cut short, {size:,} of {shard['size_bytes']:,} bytes; {REMEDY}")
    try:
        file = safe_open(path, framework="numpy")
        if (file.metadata() or {}).get("tokenizer_sha256") != manifest["tokenizer_sha256"]:
            raise DataError(f"{path}: a foreign shard, made with another tokenizer; {REMEDY}")
        tokens = file.get_slice("tokens")
        found = (size, tokens.get_dtype(), tokens.get_shape())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged ({first_line(error)}); {REMEDY}") from None
    if found != (shard["size_bytes"], SAFETENSORS_NAME[manifest["dtype"]], [shard["tokens"]]):
        raise DataError(f"{path}: a foreign shard, its size, dtype or length is not the manifest's; {REMEDY}")
    if hashed and file_sha256(path) != shard["sha256"]:
        raise DataError(f"{path}: damaged, its sha256 is not the manifest's; {REMEDY}")
    return file
