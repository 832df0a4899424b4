"""Report on a run, on rank 0: metrics.jsonl, TensorBoard and Weights & Biases, and a progress bar or a log."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lcpt.parallel import groups
from lcpt.training.metric_sinks import Sink
from lcpt.utils.progress import progress_bar

LOG_SECONDS = 30.0  # between two lines of a log, where a bar on a terminal would move


def log_rank0(line: str) -> None:
    """Print a line on rank 0, above a progress bar if there is one."""
    if groups.rank() == 0:
        with contextlib.suppress(OSError):  # the terminal is gone; the run is not
            tqdm.write(line, file=sys.stderr)


class Telemetry:
    """Does nothing but on rank 0. `start` and `step` take a row of metrics, floats unrounded.

    done: tokens, of `total`, that came before.

    A sink that cannot write is left out from then on, with a warning: it keeps no checkpoint from being saved.
    """

    def __init__(self, folder: Path, last_step: int, total: int, done: int, sinks: list[Sink]):
        self._folder, self.is_main = folder, groups.rank() == 0
        if self.is_main:
            self._metrics = open(folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115  close() closes it
            self._unwritten: list[str] = []
            self._sinks = sinks
            self._total = total
            self._bar = progress_bar(
                initial=done,
                total=self._total,
                unit="tok",
                unit_scale=True,
                smoothing=0.1,
            )
            self._last_step, self._said, self._valid, self._validated = last_step, -LOG_SECONDS, "", 0

    def start(self, row: dict[str, Any]) -> None:
        """Take the row of step 0: a validation alone."""
        if self.is_main:
            self._record(row)
            log_rank0(f"before the first step: {self._valid.removeprefix(', ')}")

    def step(self, row: dict[str, Any]) -> None:
        """Take the row of a step that was made."""
        if self.is_main:
            self._record(row)
            stale = f" at step {self._validated}" * (bool(self._valid) and self._validated != row["step"])
            self._show(row, f"step {row['step']}: loss {row['loss']:.3f}{self._valid}{stale}")

    def _record(self, row: dict[str, Any]) -> None:
        self._unwritten.append(json.dumps(_without_nan(row)) + "\n")
        if error := self._write():
            log_rank0(f"warning: {self._folder}/metrics.jsonl cannot be written ({error}); its rows wait for room")
        self._each_sink(lambda sink: sink.log(row))
        if "valid_loss" in row:
            self._validated = row["step"]
        if "valid_bits_per_byte" in row:
            self._valid = f", valid {row['valid_bits_per_byte']:.3f} bits/byte"
        elif "valid_loss" in row:
            self._valid = f", valid {row['valid_loss']:.3f}"

    def skipped(self, step: int, reason: str, documents: list[str]) -> None:
        """Note a step that did not update the weights: in skipped.jsonl, and above the bar."""
        if self.is_main:
            row, path = {"step": step, "reason": reason, "documents": documents}, self._folder / "skipped.jsonl"
            with contextlib.suppress(OSError), open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            log_rank0(f"warning: step {step} is skipped: {reason}; its documents are in {path}")

    def sample(self, step: int, name: str, prompt: str, text: str) -> None:
        """Note how the model continues the prompt, which `name` is the source of."""
        if self.is_main:
            row, path = {"step": step, "prompt": prompt, "text": text}, self._folder / "samples.jsonl"
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._each_sink(lambda sink: sink.text(step, f"samples/{name}", prompt, text))

    def flush(self) -> OSError | None:
        """Sync every row so far to the disk: a checkpoint must not outlive the rows before it. Returns the error."""
        if not self.is_main:
            return None
        self._each_sink(lambda sink: sink.flush())
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
            for sink in self._sinks:
                sink.close()

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

    def _each_sink(self, action: Callable[[Sink], None]) -> None:
        """Do this with each sink; one that fails is left out from then on."""
        for sink in list(self._sinks):
            try:
                action(sink)
            except OSError as error:
                self._sinks.remove(sink)
                log_rank0(f"warning: {type(sink).__name__}'s curves end here: {error}")

    def _show(self, row: dict[str, Any], line: str) -> None:
        line += f", lr {row['learning_rate']:.3g}"
        if self._bar.disable:
            if row["step"] == self._last_step or time.monotonic() - self._said > LOG_SECONDS:
                self._said = time.monotonic()
                log_rank0(f"{line}, {speed(row)}, {row['tokens'] / self._total:.1%} of the run")
            return
        with contextlib.suppress(OSError):
            self._bar.set_description_str(f"{line}, {speed(row)}", refresh=False)
            self._bar.update(row["tokens"] - self._bar.n)


def speed(row: dict[str, Any]) -> str:
    """Say how fast a step was, and with how much memory."""
    tflops = row["tflops_per_second"]
    flops = f"{tflops:,.0f} TFLOP/s" if tflops >= 10 else f"{1e3 * tflops:,.3g} GFLOP/s"
    mfu = "" if row["mfu"] is None else f" (MFU {row['mfu']:.1%})"
    memory = f"{row['peak_memory_bytes'] / 2**30:.1f} GiB"
    return f"{row['tokens_per_second']:,.0f} tokens a second, {flops} a rank{mfu}, {memory}"


def _without_nan(value: Any) -> Any:
    """Put None, JSON's null, in the place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
