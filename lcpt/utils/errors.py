"""Shorten the errors of libraries to one line that our own can quote."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of the message, at most 200 characters; without a message, the name of the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def one_line(error: object) -> str:
    """Return the whole message on one line."""
    return " ".join(str(error).split())


def typed_first_line(error: BaseException) -> str:
    """Return the name of the error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
