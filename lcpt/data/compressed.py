"""Bytes of a file, unpacked when its name says that it is packed."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO

CHUNK = 2**20
COMPRESSIONS = (".gz", ".xz", ".zst")
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a bad file raises


def read_chunks(path: str) -> Iterator[bytes]:
    """Non-empty pieces of the unpacked content. Raises one of DAMAGE where the file is damaged or cut short."""
    suffix = path[path.rfind(".") :].lower()
    with open(path, "rb") as file:
        if suffix == ".zst":
            yield from _unpack_zstandard(file)
            return
        stream = {".gz": gzip.open, ".xz": lzma.open}.get(suffix, lambda plain: plain)(file)
        while chunk := stream.read(CHUNK):
            yield chunk


def _unpack_zstandard(file: BinaryIO) -> Iterator[bytes]:
    """Every frame of the file. zstandard.open would take a file that is cut short for a complete one."""
    import zstandard  # here: little else needs it

    frame = None
    try:
        while packed := file.read(CHUNK):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if chunk := frame.decompress(packed):
                    yield chunk
                packed = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None:
        raise EOFError("compressed file ended before the end of its last frame")
