"""Record what a few steps do, in a trace that chrome://tracing and Perfetto show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch.profiler import ProfilerActivity, profile

from lcpt.parallel import groups


@dataclass
class ProfileConfig:
    start: Optional[int] = None  # noqa: UP045  the first step of the trace; null: none
    steps: int = 3

    def __post_init__(self):
        for name in ("start", "steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"training.profile.{name} is {value}; it must be ≥ 1")


class Profiler:
    """Writes profile/steps-A-B.json.gz of rank 0 to a run's folder. Call `before` and `after` at each step."""

    def __init__(self, run: Path, config: ProfileConfig):
        self._run, self._config = run, config
        self._profile: profile | None = None
        if config.start is not None and groups.device().type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=100_000)  # for the snapshot when memory runs out

    def before(self, step: int) -> None:
        if step == self._config.start and groups.rank() == 0:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (groups.device().type == "cuda")
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def after(self, step: int, last: bool) -> str | None:
        """End the trace after its last step, or after the `last` of the run -> then a line that says where it is."""
        start = self._config.start
        if self._profile is None or start is None or not (last or step == start + self._config.steps - 1):
            return None
        self._profile.stop()
        trace = self._run / "profile" / f"steps-{start}-{step}.json.gz"
        try:
            trace.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(trace))
        except OSError as error:  # a full disk costs the trace, not the run
            return f"warning: the trace of steps {start} to {step} cannot be written: {error}"
        finally:
            self._profile = None
        return f"a trace of steps {start} to {step} is in {trace}; ui.perfetto.dev shows it"
