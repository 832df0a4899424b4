"""Open the files of a prepared folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lcpt.data.errors import DataError
from lcpt.data.open_tokenizer import TOKENIZERS, find_tokenizer
from lcpt.utils.errors import first_line
from lcpt.utils.hashing import file_sha256

SAFETENSORS_NAME = {"uint16": "U16", "uint32": "U32"}
DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}
REMEDY = "prepare the data again, or restore the file"


def check_tokenizer(folder: Path, manifest: dict) -> None:
    """Raise DataError unless the folder's tokenizer is the one that made its tokens."""
    path = find_tokenizer(folder)
    if not path.is_file():
        raise DataError(f"{path}: missing, and so is {TOKENIZERS[1]}; {REMEDY}")
    if file_sha256(path) != manifest["tokenizer_sha256"]:
        raise DataError(f"{path}: is not the tokenizer that made these tokens, or is damaged; {REMEDY}")


def check_shard(folder: Path, manifest: dict, shard: dict, hashed: bool) -> None:
    """Raise DataError unless a shard is the one of the manifest; hashed: by its content too."""
    path = folder / shard["file"]
    if not path.is_file():
        raise DataError(f"{path}: missing; {REMEDY}")
    size = path.stat().st_size
    if size < shard["size_bytes"]:
        raise DataError(f"{path}: cut short, {size:,} of {shard['size_bytes']:,} bytes; {REMEDY}")
    try:
        file = safe_open(path, framework="numpy")  # a strict reader of headers
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


def map_shard(path: Path, size: int) -> dict[str, np.ndarray]:
    """Map the tensors of a shard of that many bytes into memory, by name, read-only: what is not used is not read.

    Raises DataError where the file is no longer there, or is shorter now.
    """
    try:
        content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", shape=(size,)))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); {REMEDY}") from None
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:begin].tobytes())
    header.pop("__metadata__", None)
    return {
        name: content[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]].view(DTYPES[entry["dtype"]])
        for name, entry in header.items()
    }
