"""The error that this package raises for what a user can put right."""


class DataError(ValueError):
    """Bad input or a damaged file. The message is one line: the file or number at fault, and the remedy."""
