"""What asks a run to save and leave: SIGTERM, SIGUSR1 (SLURM's warning), Ctrl-C, a terminal or launcher that is gone.

A signal only raises a flag on the rank that it reached; the loop has all ranks agree on it at the end of a step.
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
    """`asked` names what asked this process to leave, None so far. A second Ctrl-C ends it at once."""

    def __init__(self):
        self.asked: str | None = None
        self._interrupts = 0
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup is a wish to stay
                signal.signal(number, self._note)
        if launcher := deepspeed_launcher():
            threading.Thread(target=self._watch_launcher, args=launcher, daemon=True).start()

    def _note(self, number: int, frame) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(128 + number)
        self.asked = self.asked or signal.Signals(number).name

    def _watch_launcher(self, launcher: int, runner: int) -> None:
        """The `deepspeed` command dies of a signal without passing it on, and its children would train on unseen."""
        while os.getppid() == launcher and parent_of(launcher) == runner:
            time.sleep(POLL_SECONDS)
        self.asked = self.asked or "the end of the deepspeed launcher"


def deepspeed_launcher() -> tuple[int, int] | None:
    """(pid of the launcher that started this process, pid of its own parent); None if another program did."""
    launcher = os.getppid()
    try:
        if b"deepspeed.launcher.launch" in Path(f"/proc/{launcher}/cmdline").read_bytes():
            return launcher, parent_of(launcher)
    except OSError:  # no /proc
        pass
    return None


def parent_of(pid: int) -> int | None:
    """None when there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
