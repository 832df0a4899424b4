"""SHA-256 of files and of JSON objects."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def self_sha256(content: dict, separators: tuple[str, str] | None = None) -> str:
    """Hex SHA-256 of a JSON object without its own `sha256` field, keys sorted; separators are those of `json`."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=separators).encode()).hexdigest()
