"""Compute the learning rate of a step: linear warm-up, then cosine decay or warm-up-stable-decay (WSD)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from lcpt.training.config import TrainingConfig
from lcpt.training.phases import Phase, phase_of

JUMP = 1.5  # times the rate that the old schedule leads to


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Compute the rate of step 0 … max_steps - 1: lr at the end of warm-up, final_lr_fraction · lr at the last step.

    cosine: half a cosine. wsd: constant, then linear over the last `decay_fraction` of all steps (arXiv 2404.06395).
    """
    return _rate(step + 1, training.warmup_steps, training.max_steps, training)


class Schedule(NamedTuple):
    """Holds what decides the rate of every step of a run."""

    training: TrainingConfig  # the run's
    phases: Sequence[Phase]

    def rate(self, step: int) -> float:
        """Compute the rate of step 1 … max_steps.

        A phase with a schedule of its own runs through it in its own steps. The others follow the run's, which counts
        steps or tokens, as training.schedule_counts says.
        """
        phase, training = phase_of(self.phases, step), self.training
        if phase.has_schedule:
            return learning_rate(step - phase.first_step, replace(phase.config.training, max_steps=phase.steps))
        if training.schedule_counts == "steps":
            return learning_rate(step - 1, training)
        counts = step, training.warmup_steps, training.max_steps
        done, warmup, last = (phase_of(self.phases, count).tokens_after(count) for count in counts)
        return _rate(done, warmup, last, training)

    def owner(self, step: int) -> tuple[str, TrainingConfig]:
        """Find whose schedule a step follows: (what a message begins with, the section `training`)."""
        phase = phase_of(self.phases, step)
        return (phase.name, phase.config.training) if phase.has_schedule else ("", self.training)


def _rate(done: int, warmup: int, last: int, training: TrainingConfig) -> float:
    """Compute the rate of a step that ends at `done` of `last` steps or tokens, `warmup` of which are warm-up."""
    if done <= warmup:
        return training.lr * done / warmup
    cosine = training.schedule == "cosine"
    start = warmup if cosine else max(warmup, round(last * (1 - training.decay_fraction)))
    if done <= start:
        return training.lr
    progress = (done - start) / (last - start)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if cosine else 1 - progress
    return training.lr * (training.final_lr_fraction + (1 - training.final_lr_fraction) * remaining)


def check_no_jump(done: int, old: Schedule, new: Schedule) -> None:
    """Raise ValueError if, after `done` steps under `old`, the rate of `new` jumps up.

    A model that has settled at a low rate forgets at a far higher one what its decay has won, and may diverge.
    """
    # The old schedule's next rate is no jump, since a warm-up rises steeply; nor is its last one, since a run may go on
    # where it ended. Half as much again is room for a deliberate change, and less than any schedule that begins anew.
    last = old.rate(done)
    usual = max(last, old.rate(done + 1) if done < old.training.max_steps else 0.0)
    rate, (name, training) = new.rate(done + 1), new.owner(done + 1)
    if rate > JUMP * usual:
        smooth = f"training.lr={training.lr * usual / rate:.3g} goes on from there, " if usual else ""
        raise ValueError(
            f"{name}the learning rate would jump from {last:.3g} at step {done} to {rate:.3g} at step {done + 1}: "
            f"{smooth}training.init_from and another run.dir warm up anew, training.allow_lr_jump=true takes the jump"
        )
