"""Read lists of named overrides, such as configs/compare/variants.txt: a name, and what it changes in a config."""

from __future__ import annotations

from pathlib import Path

from lcpt.data import DataError


def read_variants(path: Path, chosen: list[str] | None = None) -> dict[str, list[str]]:
    """Read {name: overrides "section.key=value"}; of the `chosen` names alone, where some are given.

    Lines are a name and its overrides, separated by blanks; # begins a comment line. Raises DataError for a name that
    is not there.
    """
    lines = (line.split() for line in path.read_text().splitlines())
    found = {words[0]: words[1:] for words in lines if words and not words[0].startswith("#")}
    if unknown := [name for name in chosen or [] if name not in found]:
        raise DataError(f"there is no {', '.join(unknown)} in {path}; there are {', '.join(found)}")
    return {name: overrides for name, overrides in found.items() if not chosen or name in chosen}
