"""What a run says while it runs: metrics.jsonl, TensorBoard and a progress bar. Only rank 0 speaks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tqdm import tqdm

from lcpt.parallel import groups


def say(line: str) -> None:
    """Print a line on rank 0, above a progress bar if there is one."""
    if groups.rank() == 0:
        tqdm.write(line, file=sys.stderr)


class Telemetry:
    """Silent on all ranks but 0: `step` takes one row of numbers, floats unrounded; `done` steps came before."""

    def __init__(self, folder: Path, steps: int, tokens_a_step: int, done: int):
        self.speaks = groups.rank() == 0
        if self.speaks:
            from torch.utils.tensorboard import SummaryWriter

            self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
            self._bar = tqdm(initial=done * tokens_a_step, total=steps * tokens_a_step, unit="tok", unit_scale=True,
                             dynamic_ncols=True, smoothing=0.1)
            self._valid = ""

    def step(self, row: dict[str, float]) -> None:
        if not self.speaks:
            return
        self._metrics.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, row["step"])
        if "valid_bits_per_byte" in row:
            self._valid = f", valid {row['valid_bits_per_byte']:.3f} bits/byte"
        self._bar.set_description_str(f"step {row['step']}: loss {row['loss']:.3f}{self._valid}", refresh=False)
        self._bar.update(row["tokens"] - self._bar.n)

    def close(self) -> None:
        if self.speaks:
            self._bar.close()
            self._metrics.close()
            self._tensorboard.close()
