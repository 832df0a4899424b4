"""Notice requests to save and leave: SIGTERM, SIGUSR1 (SLURM's warning), Ctrl-C, a terminal or launcher that is gone.

A signal only sets a flag on the rank that it reached; the loop has all ranks agree on it at the end of a step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
POLL_SECONDS = 1.0


class Preemption:
    """Sets `requested_by`, None so far, to what asks this process to leave. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested_by: str | None = None
        self._interrupts = 0
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup asks a process to stay
                signal.signal(number, self._note)
        if launcher := deepspeed_launcher():
            threading.Thread(target=self._watch_launcher, args=launcher, daemon=True).start()

    def _note(self, number: int, frame) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(128 + number)
        self.requested_by = self.requested_by or signal.Signals(number).name

    def _watch_launcher(self, launcher: int, runner: int | None) -> None:
        """Leave when the `deepspeed` command is gone: it dies of a signal without passing it on to its children."""
        while os.getppid() == launcher and parent_of(launcher) == runner:
            time.sleep(POLL_SECONDS)
        self.requested_by = self.requested_by or "the end of the deepspeed launcher"


def deepspeed_launcher() -> tuple[int, int | None] | None:
    """Find (pid of the launcher that started this process, pid of its parent); None if another program did."""
    launcher = os.getppid()
    try:
        if b"deepspeed.launcher.launch" in Path(f"/proc/{launcher}/cmdline").read_bytes():
            return launcher, parent_of(launcher)
    except OSError:  # no /proc
        pass
    return None


def parent_of(pid: int) -> int | None:
    """Return the pid of its parent, None when there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
