import fcntl
import os
import struct
import sys
import termios
import weakref

import pytest
from tqdm import tqdm

from lcpt.utils.progress import progress_bar


@pytest.fixture
def terminal(monkeypatch):
    """Make stderr a terminal of so many columns; the function returns what it shows."""
    ours, theirs = os.openpty()
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(tqdm, "_instances", weakref.WeakSet())  # bars that other tests left take its line

    def read() -> str:
        sys.stderr.write("end\n")
        sys.stderr.flush()
        shown = ""
        while not shown.endswith("end\r\n"):  # a terminal may hand it over in parts
            shown += os.read(ours, 65536).decode()
        return shown.removesuffix("end\r\n")

    def resize(columns: int):
        monkeypatch.setattr(sys, "stderr", os.fdopen(theirs, "w"))  # here: pytest sets its own before the test
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
        return read

    yield resize
    os.close(ours)


@pytest.mark.parametrize("columns, least, most", [(0, 60, 80), (40, 30, 40)])
def test_a_bar_is_seen_in_a_terminal_that_has_no_size_and_fits_one_that_has(terminal, columns, least, most):
    shown = terminal(columns)
    list(progress_bar(range(3), desc="counting"))
    last = shown().rstrip().split("\r")[-1]
    assert last.startswith("counting: 100%") and least <= len(last) <= most


def test_nothing_is_drawn_into_a_file_or_where_it_is_hidden(terminal, tmp_path, monkeypatch):
    shown = terminal(80)
    list(progress_bar(range(3), hidden=True))
    assert shown() == ""
    with open(tmp_path / "log.txt", "w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        list(progress_bar(range(3)))
    assert (tmp_path / "log.txt").read_text() == ""
