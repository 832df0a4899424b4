"""Define the error that this package raises for what a user can put right."""


class CheckpointError(ValueError):
    """Says in one line why a checkpoint cannot be used: the file, and what is wrong with it."""
