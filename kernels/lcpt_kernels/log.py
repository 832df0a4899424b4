"""The one logger of this package."""

from __future__ import annotations

import logging
from functools import cache


@cache
def log_once(message: str) -> None:
    """Log a message the first time that it comes up in this process."""
    logging.getLogger("lcpt_kernels").info(message)
