"""Read and write manifest.json, which lists what a prepared folder holds.

Its own hash detects damage to it; the fingerprint tells datasets of other content apart, and gives their order.
"""

from __future__ import annotations

import json
from pathlib import Path

from lcpt.data.errors import DataError
from lcpt.utils.file_names import is_inside
from lcpt.utils.hashing import self_sha256

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


def with_sha256(content: dict) -> dict:
    """Add the key `sha256`: hex, of the canonical JSON of everything else."""
    return {**content, "sha256": self_sha256(content, separators=(",", ":"))}


def fingerprint_of(manifest: dict) -> str:
    """Return the hex sha256 of the tokenizer and of every token in turn, whatever files they came from or are in.

    A manifest from before there was one has its own hash for it, so that its runs go on and its order stays.
    """
    return manifest.get("fingerprint", manifest["sha256"])


def render(manifest: dict) -> bytes:
    """Write a manifest in its one form, so that any other byte in the file is damage."""
    return (json.dumps(manifest, indent=1) + "\n").encode()


def load_manifest(folder: str | Path) -> dict:
    """Load the manifest of a prepared folder. Raises DataError when it is missing, damaged or of another schema."""
    path = Path(folder) / MANIFEST
    remedy = "prepare the data again with lcpt prepare"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; this folder is not prepared data: {remedy}") from None
    try:
        manifest = json.loads(raw)
        version = manifest["schema_version"]
        whole = manifest == with_sha256(manifest) and raw == render(manifest)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{path}: damaged, or not a manifest of prepared data; {remedy}") from None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}; {remedy}")
    if not whole:
        raise DataError(f"{path}: damaged, its sha256 does not match its content; {remedy}")
    for shard in manifest["shards"]:
        if not is_inside(shard["file"]):
            raise DataError(f"{path}: lists {shard['file']!r}, which is no file of its folder; {remedy}")
    return manifest
