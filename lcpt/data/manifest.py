"""manifest.json: what a prepared folder holds. Its own hash detects damage to it and is the dataset's fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lcpt.data.errors import DataError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"


def seal(content: dict) -> dict:
    """The content with its `sha256` (hex, of the canonical JSON of everything else)."""
    canonical = json.dumps({k: v for k, v in content.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    return {**content, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


def render(manifest: dict) -> bytes:
    """The one way a manifest is written, so that any other byte in the file is damage."""
    return (json.dumps(manifest, indent=1) + "\n").encode()


def load_manifest(folder: str | Path) -> dict:
    """The manifest of a prepared folder. Raises DataError when it is missing, damaged or of another schema."""
    path = Path(folder) / MANIFEST
    remedy = "prepare the data again with tools/prepare_data.py"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; this folder is not prepared data: {remedy}") from None
    try:
        manifest = json.loads(raw)
        version = manifest["schema_version"]
        whole = manifest == seal(manifest) and raw == render(manifest)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{path}: damaged, or not a manifest of prepared data; {remedy}") from None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}; {remedy}")
    if not whole:
        raise DataError(f"{path}: damaged, its sha256 does not match its content; {remedy}")
    return manifest


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
