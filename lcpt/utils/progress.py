"""Show how far work has come."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm

SIZE = {"ncols": 80, "nrows": 24}  # where a terminal states none: in one of no size tqdm draws nothing


def progress_bar(iterable: Iterable | None = None, *, hidden: bool = False, **options) -> tqdm:
    """Make a tqdm bar with its options; it is drawn in a terminal alone, and never into a file."""
    size = {"dynamic_ncols": True} if _has_columns() else SIZE
    return tqdm(iterable, disable=True if hidden else None, **size, **options)


def _has_columns() -> bool:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):  # no terminal: nothing is drawn
        return False
