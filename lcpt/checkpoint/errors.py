"""The error that this package raises for what a user can put right."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line: the file, and what is wrong with it."""
