"""Read what several commands take in the same way: lists, and files to write."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Of an argument --checkpoint.
CHECKPOINT: dict[str, Any] = {
    "metavar": "RUN|STEP|EXPORT",
    "help": "a run folder, one of its steps, or what export.py wrote",
}


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


def check_output(output: str | Path | None, *suffixes: str) -> None:
    """See that a command can write a file, and those beside it with other suffixes, before it works. Raises OSError.

    Their folder is made. None is no file.
    """
    if output is None:
        return
    output = Path(output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; name a file in it")
    output.parent.mkdir(parents=True, exist_ok=True)
    for file in (output, *(output.with_suffix(suffix) for suffix in suffixes)):
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder, and a file of that name is to be written; name another file")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise PermissionError(f"{file} cannot be written; name another file")
