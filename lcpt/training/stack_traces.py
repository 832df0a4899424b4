"""Write the stack traces of a rank's threads when it hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from pathlib import Path
from typing import TextIO, cast

from lcpt.parallel import groups


class StackTraces:
    """Writes those of this rank to a file of `folder`, removed if it stays empty, or to stderr."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._own = None
        if folder:
            folder.mkdir(exist_ok=True)
            self._own = open(_file_of(folder, groups.rank()), "w")  # noqa: SIM115  close() closes it
        self._file = self._own or cast(TextIO, sys.__stderr__)

    @property
    def place(self) -> str:
        return str(self._folder or "stderr")

    def dump(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._file)

    def dump_unless_called_within(self, seconds: float) -> None:
        """Dump from a C thread, which runs even where a Python thread keeps the interpreter's lock."""
        faulthandler.dump_traceback_later(seconds, file=self._file)

    def of(self, rank: int, patience_s: float) -> str:
        """Read another rank's, as far as it could write them within `patience_s`: on a busy machine it is late."""
        if self._folder is None:
            return "(not written)"
        deadline, before = time.monotonic() + patience_s, ""
        while True:
            try:
                text = _file_of(self._folder, rank).read_text()
            except OSError:
                return "(not written)"
            if text and text == before or time.monotonic() > deadline:
                return text or "(its process could not say)"
            before = text
            time.sleep(0.1)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._folder and self._own:
            self._own.close()
            own = _file_of(self._folder, groups.rank())
            with contextlib.suppress(OSError):
                if not own.stat().st_size:
                    own.unlink()
                self._folder.rmdir()  # the last rank to leave finds it empty


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"
