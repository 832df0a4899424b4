"""Read what several commands take in the same way: lists, and files to write."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def words(given: Iterable[str]) -> list[str]:
    """Split an argument of nargs="+": with commas, with spaces, or with both."""
    return [word for text in given for word in text.replace(",", " ").split()]


def whole_numbers(name: str, given: Iterable[str]) -> list[int]:
    """Read a list of whole numbers ≥ 1. Raises ValueError that names the argument."""
    found = words(given)
    if not found or not all(word.isdecimal() and int(word) for word in found):
        raise ValueError(f"--{name} {' '.join(given)} is no list of whole numbers ≥ 1; give 8192,16384")
    return [int(word) for word in found]


def check_ranges(arguments: object, least: dict[str, int]) -> None:
    """Raise ValueError naming the first argument that is given and below its least value."""
    for name, value in least.items():
        if (given := getattr(arguments, name)) is not None and given < value:
            raise ValueError(f"--{name.replace('_', '-')} is {given}; it must be ≥ {value}")


def check_files(*files: str | Path | None) -> None:
    """Make the folders of files that a command will write, and see that it can, before it works. Raises OSError."""
    for file in (Path(each) for each in files if each is not None):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; name a file")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise PermissionError(f"{file} cannot be written; name another file")
