"""Steps whose loss is not finite or leaps up are skipped, on all ranks alike; too many of them end the run.

The loss and the norm judged here are sums over all ranks, so every rank reaches the same decision on its own. A skipped
step leaves weights and moments as they were, and the next one takes the next batch.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

NORMAL_STEPS = 128  # whose losses a leap is measured against
ENOUGH_STEPS = 32  # before any loss counts as a leap
LEAST_LEAP = 0.25  # nats a token
REMEMBERED = 100  # steps among which bad ones are counted


@dataclass
class BadStepsConfig:
    allowed: int = 10  # of any 100 steps in a row
    sigmas: float = 8.0  # a loss so many standard deviations above the recent mean is skipped; 0: only NaN and Inf are

    def __post_init__(self):
        if self.allowed < 0:
            raise ValueError(f"training.bad_steps.allowed is {self.allowed}; it must be ≥ 0")
        if not 0 <= self.sigmas < math.inf:
            raise ValueError(f"training.bad_steps.sigmas is {self.sigmas}; it must be ≥ 0 and finite")


class BadSteps:
    """Judges each step before its update. `state()` goes into a checkpoint and into the next BadSteps."""

    def __init__(self, config: BadStepsConfig, state: dict | None = None):
        state = state or {"losses": [], "bad": []}
        self._config = config
        self._losses = deque(state["losses"], maxlen=NORMAL_STEPS)
        self._bad = deque(state["bad"], maxlen=REMEMBERED)

    def skip_reason(self, loss: float, grad_norm: float) -> str | None:
        """Say why a step of this loss and gradient must not update the weights; None if it may."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"its gradient's norm is {grad_norm}"
        if self._config.sigmas and len(self._losses) >= ENOUGH_STEPS:
            mean = sum(self._losses) / len(self._losses)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in self._losses) / len(self._losses))
            if loss > mean + max(self._config.sigmas * deviation, LEAST_LEAP):
                return f"its loss {loss:.3f} leaps up from a mean of {mean:.3f} (standard deviation {deviation:.3f})"
        return None

    def record(self, loss: float | None, skip_reason: str | None) -> None:
        """Note a step; loss: None where its batch had nothing to predict."""
        self._bad.append(skip_reason is not None)
        if skip_reason is None and loss is not None:
            self._losses.append(loss)

    @property
    def count(self) -> int:
        """Bad steps among the last 100."""
        return sum(self._bad)

    @property
    def streak(self) -> int:
        """Bad steps up to the last one without a good one between."""
        return next((n for n, bad in enumerate(reversed(self._bad)) if not bad), len(self._bad))

    @property
    def are_too_many(self) -> bool:
        return self.count > self._config.allowed

    def state(self) -> dict:
        return {"losses": list(self._losses), "bad": list(self._bad)}

    def explain(self, step: int, skip_reason: str, documents: list[str], run: Path) -> str:
        """Say why the run ends at a bad step, whose batch is of these documents, and what to do."""
        if self.streak == self.count:
            first = step - self.streak + 1
            return (
                f"every step since {first} was bad, now step {step}: {skip_reason}; the weights broke there, "
                f"not the data: remove what {run}/checkpoints holds of step {first - 1} and later, "
                "lower training.lr, and start again"
            )
        some = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if documents[5:] else "")
        return (
            f"{self.count} of the last 100 steps were bad, now step {step}: {skip_reason}; its "
            f"batch is of {some} ({run}/skipped.jsonl has all of them); mend the data, lower "
            "training.lr, or allow more with training.bad_steps.allowed"
        )
