"""Train a model: the pretraining loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lcpt.data import batch_documents
from lcpt.parallel import groups
from lcpt.training.bad_steps import BadSteps
from lcpt.training.checks import Start, check_start
from lcpt.training.engine import adam_step, build_engine, update
from lcpt.training.exit_codes import GiveUp, Preempted
from lcpt.training.history import History
from lcpt.training.preemption import Preemption
from lcpt.training.resume import restore
from lcpt.training.run_folder import begin, finish, write_marker
from lcpt.training.same_run import data_position
from lcpt.training.saving import Saver
from lcpt.training.schedule import learning_rate
from lcpt.training.setup import set_up
from lcpt.training.telemetry import Telemetry, log_rank0
from lcpt.training.watchdog import STARTUP_TIMEOUT_S, Watchdog

if TYPE_CHECKING:
    from lcpt.config import Config


def train(config: Config, config_yaml: str, history: History, preemption: Preemption, watch: Watchdog) -> None:
    """Run the experiment on this rank, or continue it; every rank of the job calls it, after groups.join().

    Raises, the same on all ranks: groups.SetupError for bad input, before training starts; Preempted, GiveUp
    or saving.SaveError.
    """
    run = Path(config.run.dir)
    start = check_start(config, groups.world_size())
    with groups.raise_on_all_ranks():
        if groups.rank() == 0:
            history.read()
    if start.complete:
        log_rank0(f"{run} is complete at step {start.state['step']}; for another run name another run.dir")
        finish(run, history)
    else:
        if start.checkpoint:
            log_rank0(f"{run} continues from {start.checkpoint.name}")
        training = Training(config, config_yaml, start, history, preemption, watch)
        training.loop()
        saver = training.saver
        finish(
            run,
            history,
            save_stall_fraction=training.save_stall_fraction,
            saves=saver.saves,
            save_stall_seconds=saver.stalled / saver.saves,
            save_seconds=saver.writing / saver.saves,
        )


class Training:
    """Holds what the loop works with; `state` is that of the checkpoint to continue from."""

    def __init__(
        self,
        config: Config,
        config_yaml: str,
        start: Start,
        history: History,
        preemption: Preemption,
        watch: Watchdog,
    ):
        self.config, self.state, self.preemption, self.watch = config, start.state, preemption, watch
        self.source, self.accumulation = start.source, start.accumulation
        self.run, self.device, self.began = Path(config.run.dir), groups.device(), time.perf_counter()
        with groups.raise_on_all_ranks():
            model, self.batches, self.validation = set_up(config, start)
        begin(self.run, config_yaml, history, start)
        watch.write_stacks_to(self.run / "stacks")
        self.engine = build_engine(model.to(self.device), config.training, config.parallel, self.accumulation)
        if start.checkpoint:
            restore(self.engine, start.checkpoint)
        attachments = {"config.yaml": self.run / "config.yaml", **self.source.attachments}
        self.saver = Saver(self.engine, self.run / "checkpoints", config.checkpoint, attachments, watch)
        self.bad_steps = BadSteps(config.training.bad_steps, start.state.get("bad_steps"))
        self.telemetry = Telemetry(self.run, config.training, start.state["step"])

    def loop(self) -> None:
        training = self.config.training
        try:
            if "unvalidated" in self.state:
                self.end_step(self.state["unvalidated"], save=True, leave=False)
            for step in range(self.state["step"] + 1, training.last_step + 1):
                started, waited = time.perf_counter(), self.batches.waited
                first = step == self.state["step"] + 1  # which compiles and allocates
                timeout_s = STARTUP_TIMEOUT_S if first else None
                loss, asked, time_to_save = self.forward_and_backward(step, timeout_s)
                rate, skip_reason = learning_rate(step - 1, training), self.bad_steps.skip_reason(loss)
                self.watch.heartbeat(f"the update of step {step}", timeout_s)
                grad_norm = update(self.engine, training, rate, skip=skip_reason is not None)
                if skip_reason is None and not math.isfinite(grad_norm):
                    skip_reason = f"its gradient's norm is {grad_norm}"
                seconds = time.perf_counter() - started
                row = {
                    "step": step,
                    "tokens": step * training.global_batch_tokens,
                    "loss": loss,
                    "learning_rate": rate,
                    "grad_norm": grad_norm,
                    "tokens_per_second": training.global_batch_tokens / seconds,
                    "step_seconds": seconds,
                    "data_wait_fraction": (self.batches.waited - waited) / seconds,
                    "save_stall_fraction": self.save_stall_fraction,
                }
                self.bad_steps.record(loss, skip_reason)
                if skip_reason:
                    self.report_skipped_step(row, skip_reason)
                self.end_step(row, save=time_to_save, leave=asked)
            self.saver.finish()
        finally:
            self.saver.settle()
            self.telemetry.close()
            self.batches.close()

    @property
    def save_stall_fraction(self) -> float:
        """The part of the time since this start in which saving stalled training."""
        return self.saver.stalled / (time.perf_counter() - self.began)

    def forward_and_backward(self, step: int, timeout_s: float | None) -> tuple[float, bool, bool]:
        """Accumulate the step's gradients, for `update` to apply.

        -> (mean loss of the step's labels in nats, whether a rank was asked to leave, whether the clock wants a save)
        """
        scored, world, micro_batch = self.batches.scored, groups.world_size(), self.config.training.micro_batch
        self.watch.heartbeat(f"the data of step {step}", timeout_s)
        inputs, labels = (torch.from_numpy(x).to(self.device).split(micro_batch) for x in self.batches.get(step - 1))
        nats: torch.Tensor | float = 0.0
        for number, (x, y) in enumerate(zip(inputs, labels, strict=True), start=1):  # [micro_batch, context] each
            self.watch.heartbeat(f"micro-batch {number} of step {step}", timeout_s)
            loss, _ = self.engine(x, labels=y)
            # The engine averages over ranks and micro-batches: this makes it the mean over all labels of the step.
            self.engine.backward(loss * (world * self.accumulation / scored))
            nats += loss.detach()
            if number < self.accumulation:
                self.engine.step()  # DeepSpeed counts micro-batches in it; no update
        due = groups.rank() == 0 and self.saver.minutes_are_up()
        sums = groups.all_reduce_sum(nats, bool(self.preemption.requested_by), due, device=self.device)
        return sums[0] / scored, bool(sums[1]), bool(sums[2])

    def report_skipped_step(self, row: dict, skip_reason: str) -> None:
        """Write down a bad step; raises GiveUp if there are too many."""
        config, step = self.config, row["step"]
        documents = batch_documents(self.source, config.run.seed, step - 1, config.sequences, config.data.context)
        self.telemetry.skipped(step, skip_reason, documents)
        if self.bad_steps.are_too_many:
            self.telemetry.step(row)
            if self.bad_steps.streak == self.bad_steps.count:
                first = step - self.bad_steps.streak + 1
                raise GiveUp(
                    f"every step since {first} was bad, now step {step}: {skip_reason}; the weights broke there, "
                    f"not the data: remove what {self.run}/checkpoints holds of step {first - 1} and later, "
                    "lower training.lr, and start again"
                )
            some = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if documents[5:] else "")
            raise GiveUp(
                f"{self.bad_steps.count} of the last 100 steps were bad, now step {step}: {skip_reason}; its "
                f"batch is of {some} ({self.run}/skipped.jsonl has all of them); mend the data, lower "
                "training.lr, or allow more with training.bad_steps.allowed"
            )

    def check_end(self, row: dict) -> None:
        """Raise GiveUp, before that is saved as the end of the run, if its last loss or validation is not finite."""
        step, first, broken = row["step"], row["step"] - self.bad_steps.streak + 1, not_finite(row)
        if broken:
            raise GiveUp(
                f"the run ends at step {step} with {' and '.join(f'{name} {row[name]}' for name in broken)}, so this "
                f"step is not saved: if the weights broke, remove what {self.run}/checkpoints has of step {first - 1} "
                f"and later, and lower training.lr; if the batch is at fault ({self.run}/skipped.jsonl), mend the "
                "data; then start again"
            )

    def end_step(self, row: dict, save: bool, leave: bool) -> None:
        """Validate, write down and save what is due after a step; raises Preempted when asked to leave."""
        training, step, unvalidated = self.config.training, row["step"], {}
        if self.validation and (step == training.max_steps or step % training.valid_every_steps == 0):
            measured = self.validation.run(self.engine, self.device, self.watch, self.preemption)
            if measured is None:
                leave, unvalidated = True, {"unvalidated": row}  # the next start begins with this validation
            else:
                row |= measured
        if not unvalidated:
            self.telemetry.step(row)
            leave = leave and step < training.last_step
            if step == training.last_step:
                self.check_end(row)
        # A bad step may mean broken weights: those must not push out the checkpoints from before.
        due = (save or self.config.checkpoint.due(step)) and not self.bad_steps.streak and not not_finite(row)
        if due or leave or step == training.last_step:
            self.saver.save(
                step,
                {
                    "step": step,
                    "tokens": row["tokens"],
                    "adam_step": adam_step(self.engine),
                    **data_position(self.config, self.source),
                    "bad_steps": self.bad_steps.state(),
                    **unvalidated,
                },
                blocked=self.telemetry.flush(),
            )
        if leave:
            self.saver.finish()
            asked = self.preemption.requested_by or "another rank's signal"
            write_marker(self.run, step, asked)
            raise Preempted(f"{asked} ended the run after step {step}; the same command continues it")


def not_finite(row: dict) -> list[str]:
    """List the losses of a row, in training and in validation, that are NaN or Inf."""
    return [name for name in row if name.startswith(("loss", "valid")) and not math.isfinite(row[name])]
