"""Make every check of a start without starting, for any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lcpt.parallel import groups
from lcpt.parallel.launchers import Place
from lcpt.training.checks import check_start
from lcpt.training.history import History
from lcpt.training.phases import phase_of
from lcpt.training.run_folder import unlock

if TYPE_CHECKING:
    from lcpt.config import Config


def dry_start(config: Config, ranks: int) -> str:
    """Say in one line how a start on `ranks` ranks of such machines would go. It changes nothing on the disk.

    Raises SetupError where it would end with exit code 2.
    """
    run, history = Path(config.run.dir), History(Path(config.run.dir))
    groups.use_device(config.training.device, Place(rank=0, world=ranks, local_rank=0))
    try:
        start = check_start(config, ranks, lock_seconds=0)
        history.read()
    finally:
        unlock(run)
    step = start.state["step"]
    if start.complete:
        return f"{run} is complete at step {step}: a start would have nothing to do"
    if reason := history.crash_loop_reason(step):
        return f"the next start would be refused once: {reason}"
    where = f"go on from {start.checkpoint.name}" if start.checkpoint else "begin"
    if start.branch_from:
        where = f"branch off {start.branch_from}"
    elif start.init_from:
        where = f"begin with the weights of {start.init_from}"
    on = f"{ranks} ranks" if ranks > 1 else "1 rank"
    end = config.training.last_step
    drawn = phase_of(start.phases, end).drawn(end)
    accumulation = ", then ".join(str(each.accumulation) for each in start.phases)
    epochs = ", ".join(f"{each.epochs:.3g} of {path}" for path, each in drawn.items() if each.epochs is not None)
    return (
        f"a start on {on} would {where}; micro-batches a rank and step: {accumulation}"
        f"{epochs and f'; epochs in the whole run: {epochs}'}"
    )
