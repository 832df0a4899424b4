"""Stack traces of a rank's threads, for the day on which it hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from pathlib import Path

from lcpt.parallel import groups


class Stacks:
    """Those of this rank: in a file of `folder`, which goes again if it stays empty, or on stderr."""

    def __init__(self, folder: Path | None = None):
        self._folder, self._file = folder, sys.__stderr__
        if folder:
            folder.mkdir(exist_ok=True)
            self._file = open(self._path(groups.rank()), "w")

    @property
    def place(self) -> str:
        return str(self._folder or "stderr")

    def dump(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._file)

    def dump_unless_called_within(self, seconds: float) -> None:
        """For a thread that holds Python's lock and lets no other run: this one needs no lock."""
        faulthandler.dump_traceback_later(seconds, file=self._file)

    def of(self, rank: int) -> str:
        """Another rank's, as far as it could write them."""
        try:
            return self._path(rank).read_text() or "(its process could not say)"
        except (OSError, TypeError):
            return "(not written)"

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._folder:
            self._file.close()
            with contextlib.suppress(OSError):
                if not self._path(groups.rank()).stat().st_size:
                    self._path(groups.rank()).unlink()
                self._folder.rmdir()  # the last rank to leave finds it empty

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"
