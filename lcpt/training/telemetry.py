"""What a run says while it runs: metrics.jsonl, TensorBoard and a progress bar. Only rank 0 speaks."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from lcpt.parallel import groups
from lcpt.training.config import TrainingConfig


def say(line: str) -> None:
    """Print a line on rank 0, above a progress bar if there is one."""
    if groups.rank() == 0:
        tqdm.write(line, file=sys.stderr)


class Telemetry:
    """Silent on all ranks but 0: `step` takes one row of numbers, floats unrounded; `done` steps came before."""

    def __init__(self, folder: Path, training: TrainingConfig, done: int):
        self._folder, self.speaks = folder, groups.rank() == 0
        if self.speaks:
            from torch.utils.tensorboard import SummaryWriter

            self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
            total, so_far = (steps * training.global_batch_tokens for steps in (training.last_step, done))
            self._bar = tqdm(initial=so_far, total=total, unit="tok", unit_scale=True, dynamic_ncols=True,
                             smoothing=0.1)
            self._valid = ""

    def step(self, row: dict[str, float]) -> None:
        if not self.speaks:
            return
        written = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._metrics.write(json.dumps(written) + "\n")
        for name, value in row.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, row["step"])
        if "valid_bits_per_byte" in row:
            self._valid = f", valid {row['valid_bits_per_byte']:.3f} bits/byte"
        self._bar.set_description_str(f"step {row['step']}: loss {row['loss']:.3f}{self._valid}", refresh=False)
        self._bar.update(row["tokens"] - self._bar.n)

    def skipped(self, step: int, reason: str, documents: list[str]) -> None:
        """Note a step that did not update the weights: in skipped.jsonl, and above the bar."""
        if self.speaks:
            row = {"step": step, "reason": reason, "documents": documents}
            with open(self._folder / "skipped.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            say(f"warning: step {step} is skipped: {reason}; its documents are in {file.name}")

    def flush(self) -> None:
        """Bring every row so far to the disk: a checkpoint must not outlive the rows before it."""
        if self.speaks:
            os.fsync(self._metrics.fileno())
            self._tensorboard.flush()

    def close(self) -> None:
        if self.speaks:
            self._bar.close()
            self._metrics.close()
            self._tensorboard.close()
