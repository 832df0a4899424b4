"""Name the ways a run can end, with the exit code that tells a supervisor what to do next."""

from __future__ import annotations

FINISHED = 0
FAULT = 1  # a rank died, hung or raised: start again
BAD_INPUT = 2  # said in one line: start again with other input
GIVE_UP = 3  # starting again would end in the same way: a person must look
PREEMPTED = 75  # asked to leave by a signal, all is saved: start again (EX_TEMPFAIL)


class Preempted(Exception):
    """Ends a run that was asked to leave, on all ranks, after its state is saved."""


class GiveUp(Exception):
    """Ends a run that would fail again: one line that says what keeps happening, and what a person can do."""
