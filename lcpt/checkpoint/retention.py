"""Remove old checkpoints: the last few stay, and milestones for good."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lcpt.checkpoint.write import CheckpointConfig, step_folders


def remove_old(checkpoints: Path, newest: int, config: CheckpointConfig) -> None:
    """Remove step folders, except the `keep_last` up to step `newest`, milestones, and those after `newest`.

    A later folder is a damaged one that the run went back past: it does not count as one to fall back to.
    """
    steps = [(step, folder) for step, folder in step_folders(checkpoints).items() if step <= newest]
    for step, folder in steps[: -config.keep_last]:
        if not config.milestone_steps or step % config.milestone_steps:
            doomed = checkpoints / f".{folder.name}.removed"  # so that no half of it carries a step's name
            os.replace(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
