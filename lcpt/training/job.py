"""Run one rank: join the others, train under a watchdog, and end with an exit code that says why."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lcpt.parallel import groups
from lcpt.training.exit_codes import BAD_INPUT, FAULT, FINISHED, GIVE_UP, PREEMPTED, GiveUp, Preempted
from lcpt.training.history import History
from lcpt.training.loop import train
from lcpt.training.out_of_memory import explain, is_out_of_memory, write_snapshot
from lcpt.training.preemption import Preemption
from lcpt.training.saving import SaveError
from lcpt.training.watchdog import Watchdog

if TYPE_CHECKING:
    from lcpt.config import Config


def run(config: Config, config_yaml: str) -> int:
    """Train on this rank; returns the exit code (see exit_codes.py). An error of one rank alone ends the process."""
    try:
        groups.join(config.training.device)
    except groups.SetupError as error:
        return end(BAD_INPUT, error)
    preemption = Preemption()
    history = History(Path(config.run.dir))
    watch = Watchdog(config.training.hang_seconds, record=history.end)
    try:
        train(config, config_yaml, history, preemption, watch)
        code = FINISHED
    except groups.SetupError as error:
        code = end(BAD_INPUT, error)
    except Preempted as left:
        code = end(PREEMPTED, left, history)
    except GiveUp as error:
        code = end(GIVE_UP, error, history)
    except SaveError as error:
        code = end(FAULT, error, history)
    except BaseException as error:
        if is_out_of_memory(error):
            said = explain(error, config, watch.place)
            if snapshot := write_snapshot(Path(config.run.dir)):
                said += f"; {snapshot} shows what holds the memory (pytorch.org/memory_viz)"
            # What does not fit at the start will not fit the next time. Later it may be another program's fault.
            if watch.is_starting:
                watch.refuse(said)
            print(f"error: {said}", file=sys.stderr)
        watch.fail(error)
    watch.stop()
    groups.barrier()  # rank 0 holds the store: it leaves last
    groups.leave()
    return code


def end(code: int, why: Exception, history: History | None = None) -> int:
    """Print on rank 0 why the job ends, for a reason that all ranks share; returns `code`."""
    if groups.is_first():
        with contextlib.suppress(OSError):  # a full disk or a terminal that is gone
            print(f"{'note' if code == PREEMPTED else 'error'}: {why}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            if history:
                history.end("preempted" if code == PREEMPTED else str(why))
    return code
