"""Define the error that this package raises for what a user can put right."""


class DataError(ValueError):
    """Names bad input or a damaged file in one line: the file or number at fault, and the remedy."""
