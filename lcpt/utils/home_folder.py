"""Put the home folder in place of ~, which a shell leaves alone behind `key=`."""

from __future__ import annotations

import os
from typing import TypeVar

Path = TypeVar("Path", str, None)


def expand_home(path: Path) -> Path:
    """Expand a leading ~ or ~user of a path; None stays None. Raises ValueError for a user without a home folder."""
    if path is None or not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(
            f"{path}: there is no such home folder; write the path in full, or ./{path} for a folder of that name"
        )
    return expanded
