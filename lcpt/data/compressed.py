"""Read the bytes of a file, decompressed when its suffix says that it is compressed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

CHUNK = 2**20
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
WINDOW = 2**31  # bytes, the longest that Zstandard has: zstd --long=31 writes it
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a bad file raises


def read_chunks(path: str) -> Iterator[bytes]:
    """Yield the content in non-empty pieces. Raises one of DAMAGE where the file is damaged or cut short."""
    suffix = path[path.rfind(".") :].lower()
    if suffix == ".zst":
        with open(path, "rb") as file:
            yield from _unpack_zstandard(file)
        return
    with OPENERS.get(suffix, open)(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _unpack_zstandard(file: BinaryIO) -> Iterator[bytes]:
    """Decompress every frame of the file. zstandard.open would take a file that is cut short for a complete one."""
    import zstandard  # imported late: few inputs need it

    frame = None
    try:
        while packed := file.read(CHUNK):
            while packed:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
                if chunk := frame.decompress(packed):
                    yield chunk
                packed = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None:
        raise EOFError("compressed file ended before the end of its last frame")
