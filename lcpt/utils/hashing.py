"""Hash files and JSON objects with SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """Hash a file, read in pieces; returns hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def size_and_sha256(path: Path) -> dict:
    """Describe a file as manifests do."""
    return {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}


def self_sha256(content: dict, separators: tuple[str, str] | None = None) -> str:
    """Hash a JSON object without its own `sha256` field, keys sorted; separators are those of `json`."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=separators).encode()).hexdigest()
