"""Divide a run into phases: parts with data, a context, a batch or a schedule of their own.

A phase is the run's config with some keys changed, from the end of the phase before to a step or a number of tokens.
A run without phases has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional, Protocol, TypeVar

from lcpt.training.config import SCHEDULE

if TYPE_CHECKING:
    from lcpt.config import Config

OWN_SCHEDULE = tuple(key for key in SCHEDULE if key not in ("max_steps", "schedule_counts"))
MAY_CHANGE = {
    "data": ("path", "sources", "context", "mask_documents", "packing"),
    "training": ("global_batch_tokens", "micro_batch", *OWN_SCHEDULE),
    "model": ("rope_base", "rope_scaling"),
}


@dataclass
class PhaseConfig:
    """Says until when a phase lasts, and which keys it changes; the last one ends with the run."""

    until_step: Optional[int] = None  # noqa: UP045  its last one
    until_tokens: Optional[int] = None  # noqa: UP045  of the whole run by then, rounded up to a step
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.until_step is not None and self.until_tokens is not None:
            raise ValueError("phases: until_step and until_tokens are both set; set one of them")
        for section, keys in MAY_CHANGE.items():
            for key in getattr(self, section):
                if key not in keys:
                    raise ValueError(f"phases: {section}.{key} cannot change in a run; these can: {', '.join(keys)}")

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """The sections it changes, with the data either of a path or of sources."""
        data = dict(self.data)
        if data.get("sources") is not None:
            data.setdefault("path", None)
        elif data.get("path") is not None:
            data.setdefault("sources", None)
        # Its own schedule warms up only where it says so: what trains on is warm.
        training = ({"warmup_steps": 0} if self.has_schedule else {}) | self.training
        return {"data": data, "training": training, "model": self.model}

    @property
    def has_schedule(self) -> bool:
        return any(key in OWN_SCHEDULE for key in self.training)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Holds a part of a run."""

    number: int  # from 1; 0: of a run without phases
    first_step: int
    last_step: int
    tokens_before: int  # of the run, before its first step
    config: Config  # as it is in this phase
    has_schedule: bool  # one of its own, over its own steps

    def tokens_after(self, step: int) -> int:
        """Count the tokens of the run up to and with one of its steps."""
        return self.tokens_before + (step - self.first_step + 1) * self.config.training.global_batch_tokens

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1

    @property
    def name(self) -> str:
        """What a message begins with; nothing where a run has one phase."""
        return f"phase {self.number}, steps {self.first_step:,} to {self.last_step:,}: " if self.number else ""


def divide(config: Config) -> list[Phase]:
    """Divide a run. Raises ValueError where a phase ends before it begins, or has settings that cannot be."""
    if not config.phases:
        whole = Phase(
            number=0,
            first_step=1,
            last_step=config.training.max_steps,
            tokens_before=0,
            config=config,
            has_schedule=False,
        )
        return [whole]
    _check_units(config.phases)
    found: list[Phase] = []
    first_step, tokens, max_steps = 1, 0, config.training.max_steps
    for number, given in enumerate(config.phases, start=1):
        try:
            changed = config.changed(given.changes)
        except ValueError as error:
            raise ValueError(f"phases, number {number}: {error}") from None
        last_step = _last_step(given, first_step, tokens, changed.training.global_batch_tokens, max_steps)
        is_last = number == len(config.phases)
        if last_step < first_step:
            raise ValueError(
                f"phases, number {number}: it ends at {_until(given)}, and begins after step {first_step - 1:,} and "
                f"{tokens:,} tokens; let every phase end after the one before it"
            )
        if last_step > max_steps or is_last and last_step != max_steps or not is_last and last_step == max_steps:
            raise ValueError(
                f"phases, number {number}: it ends at step {last_step:,}, and training.max_steps is {max_steps:,}; "
                "the last phase, and no other, ends with the run: leave out its until_step and until_tokens"
            )
        if given.has_schedule and (warmup := changed.training.warmup_steps) > last_step - first_step:
            raise ValueError(
                f"phases, number {number}: training.warmup_steps is {warmup}, and it has {last_step - first_step + 1}"
            )
        phase = Phase(
            number=number,
            first_step=first_step,
            last_step=last_step,
            tokens_before=tokens,
            config=changed,
            has_schedule=given.has_schedule,
        )
        found.append(phase)
        first_step, tokens = last_step + 1, phase.tokens_after(last_step)
    return found


P = TypeVar("P", bound="HasLastStep")


class HasLastStep(Protocol):
    @property
    def last_step(self) -> int: ...


def phase_of(phases: Sequence[P], step: int) -> P:
    """Return the phase of a step; of step 0 the first, of one behind the end the last."""
    return next((phase for phase in phases if step <= phase.last_step), phases[-1])


def _check_units(given: Sequence[PhaseConfig]) -> None:
    used = {unit for phase in given for unit in ("until_step", "until_tokens") if getattr(phase, unit) is not None}
    if len(used) == 2:
        raise ValueError("phases: some end by until_step and some by until_tokens; take one of them for all")
    for number, phase in enumerate(given[:-1], start=1):
        if _until(phase) is None:
            raise ValueError(f"phases, number {number}: say where it ends, with until_step or until_tokens")


def _until(given: PhaseConfig) -> str | None:
    if given.until_step is not None:
        return f"step {given.until_step:,}"
    return None if given.until_tokens is None else f"{given.until_tokens:,} tokens"


def _last_step(given: PhaseConfig, first_step: int, tokens: int, batch_tokens: int, max_steps: int) -> int:
    if given.until_step is not None:
        return given.until_step
    if given.until_tokens is not None:
        return first_step - 1 - (tokens - given.until_tokens) // batch_tokens
    return max_steps
