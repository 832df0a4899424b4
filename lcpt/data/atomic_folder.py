"""Create a folder that appears whole or not at all: filled under a temporary name, synced, renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcpt.data.errors import DataError
from lcpt.data.manifest import MANIFEST
from lcpt.utils.atomic_files import fsync_path


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `output` to fill, and rename it to `output` when the block ends well.

    On an error nothing is left behind; what a killed run left is removed by the next one. Raises DataError when
    `output` holds anything, or another process is filling it.
    """
    output = Path(output).absolute()
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.unfinished")
    temporary.mkdir(exist_ok=True)
    with _locked(temporary):
        try:
            for leftover in temporary.iterdir():
                leftover.unlink()
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                fsync_path(path)
            temporary.rename(output)
            fsync_path(output.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def refuse_existing(output: str | Path) -> None:
    """Raise DataError unless `output` is absent or an empty folder."""
    output = Path(output)
    if output.is_dir():
        if (output / MANIFEST).exists():
            raise DataError(f"{output}: already holds prepared data; choose another --output, or delete it")
        if any(output.iterdir()):
            raise DataError(f"{output}: is not empty and not prepared data; choose another --output")
    elif output.exists() or output.is_symlink():
        raise DataError(f"{output}: is not a folder; choose another --output")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which the kernel releases when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{folder}: another process writes there; wait for it or choose another --output") from None
    except OSError:  # some network filesystems have no locks, and preparing there must still work
        pass
