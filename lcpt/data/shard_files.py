"""Open the files of a prepared folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lcpt.data.errors import DataError
from lcpt.data.manifest import TOKENIZER
from lcpt.utils.errors import first_line
from lcpt.utils.hashing import file_sha256

SAFETENSORS_NAME = {"uint16": "U16", "uint32": "U32"}
REMEDY = "prepare the data again, or restore the file"


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


def map_tensor(path: Path, name: str) -> np.ndarray:
    """Map an int64 tensor of a safetensors file into memory: what is not looked at is not read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    begin, end = entry["data_offsets"]
    return np.memmap(path, dtype=np.int64, mode="r", offset=8 + length + begin, shape=((end - begin) // 8,))
