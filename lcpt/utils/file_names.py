"""Check the names of files that a file from outside lists."""

from __future__ import annotations

from pathlib import PurePosixPath


def is_inside(name: object) -> bool:
    """Tell whether a folder's own file can have this name: neither absolute nor with `..`, which lead out of it."""
    if not isinstance(name, str) or not name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
