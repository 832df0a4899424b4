"""The one exception that this floor raises for what a user can put right."""


class DataError(ValueError):
    """Bad input or a damaged file. The message is one line: the file or number at fault, and the remedy."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, to be quoted inside our own single line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
