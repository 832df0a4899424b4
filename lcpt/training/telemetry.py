"""Report on a run, on rank 0: metrics.jsonl, TensorBoard, and a progress bar or a log."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from lcpt.parallel import groups
from lcpt.training.config import TrainingConfig

LOG_SECONDS = 30.0  # between two lines of a log, where a bar on a terminal would move


def log_rank0(line: str) -> None:
    """Print a line on rank 0, above a progress bar if there is one."""
    if groups.rank() == 0:
        with contextlib.suppress(OSError):  # the terminal is gone; the run is not
            tqdm.write(line, file=sys.stderr)


class Telemetry:
    """Does nothing but on rank 0. `step` takes one row of metrics, floats unrounded; `done` steps came before."""

    def __init__(self, folder: Path, training: TrainingConfig, done: int):
        self._folder, self.is_main = folder, groups.rank() == 0
        if self.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self._metrics = open(folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115  close() closes it
            self._unwritten: list[str] = []
            self._tensorboard: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
            self._total, so_far = (steps * training.global_batch_tokens for steps in (training.last_step, done))
            self._bar = tqdm(
                initial=so_far,
                total=self._total,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0.1,
                disable=None,  # shown on a terminal only
            )
            self._last_step, self._said, self._valid = training.last_step, -LOG_SECONDS, ""

    def step(self, row: dict[str, float]) -> None:
        if not self.is_main:
            return
        written = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._unwritten.append(json.dumps(written) + "\n")
        if error := self._write():
            log_rank0(f"warning: {self._folder}/metrics.jsonl cannot be written ({error}); its rows wait for room")
        self._draw(row)
        if "valid_bits_per_byte" in row:
            self._valid = f", valid {row['valid_bits_per_byte']:.3f} bits/byte"
        elif "valid_loss" in row:
            self._valid = f", valid {row['valid_loss']:.3f}"
        self._show(row, f"step {row['step']}: loss {row['loss']:.3f}{self._valid}")

    def skipped(self, step: int, reason: str, documents: list[str]) -> None:
        """Note a step that did not update the weights: in skipped.jsonl, and above the bar."""
        if self.is_main:
            row, path = {"step": step, "reason": reason, "documents": documents}, self._folder / "skipped.jsonl"
            with contextlib.suppress(OSError), open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            log_rank0(f"warning: step {step} is skipped: {reason}; its documents are in {path}")

    def flush(self) -> OSError | None:
        """Sync every row so far to the disk: a checkpoint must not outlive the rows before it. Returns the error."""
        if not self.is_main:
            return None
        if self._tensorboard:
            self._tensorboard.flush()
        try:
            if error := self._write():
                return error
            os.fsync(self._metrics.fileno())
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        if self.is_main:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._write()
            self._metrics.close()
            if self._tensorboard:
                self._tensorboard.close()

    def _write(self) -> OSError | None:
        """Write the pending rows, all or none of them."""
        end = os.fstat(self._metrics.fileno()).st_size
        data = "".join(self._unwritten).encode()
        try:
            while data:
                data = data[self._metrics.write(data) :]
        except OSError as error:
            self._metrics.truncate(end)
            return error
        self._unwritten.clear()
        return None

    def _draw(self, row: dict[str, float]) -> None:
        if self._tensorboard is None:
            return
        try:
            for name, value in row.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, row["step"])
        except OSError as error:
            self._tensorboard = None
            log_rank0(f"warning: TensorBoard's curves end at step {row['step']}: {error}")

    def _show(self, row: dict[str, float], line: str) -> None:
        if self._bar.disable:
            if row["step"] == self._last_step or time.monotonic() - self._said > LOG_SECONDS:
                self._said = time.monotonic()
                done = row["tokens"] / self._total
                log_rank0(f"{line}, {row['tokens_per_second']:,.0f} tokens a second, {done:.1%} of the run")
            return
        with contextlib.suppress(OSError):
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(row["tokens"] - self._bar.n)
