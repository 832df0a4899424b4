"""Which checkpoints stay: the last few, and milestones for good."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lcpt.checkpoint.write import CheckpointConfig, step_name


def remove_old(checkpoints: Path, newest: int, config: CheckpointConfig) -> None:
    """Remove step folders but the `keep_last` up to step `newest`, milestones, and those after `newest`.

    A later folder is a damaged one that the run went back past: it does not count as one to fall back to.
    """
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in checkpoints.glob("step-*"))
    steps = [step for step in steps if step <= newest]
    for step in steps[: -config.keep_last]:
        if not config.milestone_steps or step % config.milestone_steps:
            doomed = checkpoints / f".{step_name(step)}.removed"  # so that no half of it carries a step's name
            os.replace(checkpoints / step_name(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)
